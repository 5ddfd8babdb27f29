# A machine for one page: name, network, processes, /etc, /run and /srv of its own. The caller
# gives STEPS, a folder with a file for each step and the script of them; TOOLS, a folder with the
# program; ARCHIVES, a folder with what is served; and runs this in new namespaces.
set -u
fail() { echo "machine: $*" >&2; exit 99; }

mount -t proc proc /proc || fail 'no /proc'
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /srv || fail 'no folders'
mkdir /run/etc /run/log /run/home
# What can't be read isn't needed.
cp -a /etc/. /run/etc 2> /dev/null || true
mount --bind /run/etc /etc && mount --bind /run/log /var/log || fail 'no /etc'
rm -f /etc/hosts
cat > /etc/hosts <<'HOSTS'
127.0.0.1 localhost
::1 localhost
192.0.2.7 nbd.example.org
192.0.2.10 balancer.example.org
10.0.0.7 server.example.org
HOSTS
ip link set lo up || fail 'no loopback'
# Machines, and from which address whoever connects to them comes: clients of 192.0.2.7 are
# 192.0.2.50, those of the balancer 10.1.2.3, and the gateways 21 and 22 see the balancer.
for pair in 192.0.2.7=192.0.2.50 192.0.2.10=10.1.2.3 192.0.2.21=192.0.2.10 \
    192.0.2.22=192.0.2.10 10.0.0.7=10.0.0.50; do
    machine=${pair%=*} client=${pair#*=}
    ip address replace "$machine/32" dev lo && ip address replace "$client/32" dev lo &&
        ip route replace local "$machine" dev lo table local src "$client" || fail "no $machine"
done

mkdir -p /srv/hexz-nbd /srv/snapshots /etc/hexz-nbd /var/log/hexz-nbd /run/hexz-nbd
for archive in web-1 web-2 db; do
    cp "$ARCHIVES/$archive.hexz" /srv/hexz-nbd && cp "$ARCHIVES/$archive.hexz" /srv/snapshots
done
# What the caller's environment says must not change what is tested.
unset HEXZ_PASSWORD RUST_LOG CREDENTIALS_DIRECTORY LISTEN_PID LISTEN_FDS NOTIFY_SOCKET WATCHDOG_USEC
export HOME=/run/home PATH="$TOOLS:/usr/sbin:/usr/bin:/sbin:/bin"
mkdir "$HOME/work"
cd "$HOME/work" || fail 'no folder'
cp "$ARCHIVES"/*.hexz .
# Paths in the documents are those of the repository.
ln -s "$REPOSITORY/examples" "$REPOSITORY/packaging" .

# Runs a step: its number, and the exit code that it must have.
run() {
    echo "$1" > "$STEPS/last"
    source "$STEPS/$1.command" < /dev/null > "$STEPS/$1.out" 2>&1
    code=$?
    [ $code = "$2" ] || { echo "it ended with $code instead of $2" > "$STEPS/$1.wrong"; exit 1; }
}

# Starts a server, which takes the place of the one before it.
serve() {
    end
    echo "$1" > "$STEPS/last"
    serving=$1
    eval "$(cat "$STEPS/$1.command") &" < /dev/null > "$STEPS/$1.out" 2>&1
    server=$!
    for tries in $(seq 400); do
        # Its log may be in a file, and there are those that start a server.
        grep -qsE 'ready|Serving on|Listening on' "$STEPS/$1.out" ./*.jsonl && return
        kill -0 $server 2> /dev/null || break
        sleep 0.05
    done
    echo 'it serves nothing' > "$STEPS/$1.wrong"
    exit 1
}

end() {
    [ -z "${server-}" ] && return
    kill "$server"
    wait "$server"
    code=$?
    server=
    # Whatever happened to it meanwhile, it has to be there, and to end well.
    [ $code = 0 ] || { echo "it ended with $code" > "$STEPS/$serving.wrong"; exit 1; }
}

# Waits for lines in the servers' logs; whether they are there is found out at the end.
wait_for_log() {
    while read -r line; do said "$line"; done < "$STEPS/$1.fixed"
}

# For what pages prepare: waits until a server has said something.
said() {
    for tries in $(seq 200); do
        grep -qF -- "$1" "$STEPS"/*.out && return
        sleep 0.05
    done
    return 1
}

# What is built is built elsewhere: here it is asked whether that could be.
make() { command make --directory "$REPOSITORY" --dry-run "$@" > /dev/null; }

source "$STEPS/script"
end
