# Imitates a machine for one page, with its own network, processes, /etc, /run and /srv. The caller
# runs this in new namespaces, and sets STEPS, a folder with a file for each step and their script;
# TOOLS, a folder with the program; and ARCHIVES, a folder with the archives.
set -u
fail() { echo "machine: $*" >&2; exit 99; }

mount -t proc proc /proc || fail 'no /proc'
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /srv || fail 'no folders'
mkdir /run/etc /run/log /run/cache /run/home
# Files that can't be read aren't needed.
cp -a /etc/. /run/etc 2> /dev/null || true
mount --bind /run/etc /etc && mount --bind /run/log /var/log &&
    mount --bind /run/cache /var/cache || fail 'no /etc'
rm -f /etc/hosts
cat > /etc/hosts <<'HOSTS'
127.0.0.1 localhost
::1 localhost
192.0.2.7 nbd.example.org
192.0.2.10 balancer.example.org
10.0.0.7 server.example.org
192.0.2.30 golden.s3.eu-central-1.amazonaws.com
192.0.2.31 minio.example.org
192.0.2.32 storage.googleapis.com exampleaccount.blob.core.windows.net
192.0.2.33 images.example.org
HOSTS
ip link set lo up || fail 'no loopback'
# Machines, each with the address from which connections to it come: clients of 192.0.2.7 have
# 192.0.2.50, those of the balancer 10.1.2.3, and the gateways 21 and 22 see the balancer.
for pair in 192.0.2.7=192.0.2.50 192.0.2.10=10.1.2.3 192.0.2.21=192.0.2.10 \
    192.0.2.22=192.0.2.10 10.0.0.7=10.0.0.50 192.0.2.30=192.0.2.7 192.0.2.31=192.0.2.7 \
    192.0.2.32=192.0.2.7 192.0.2.33=192.0.2.7; do
    machine=${pair%=*} client=${pair#*=}
    ip address replace "$machine/32" dev lo && ip address replace "$client/32" dev lo &&
        ip route replace local "$machine" dev lo table local src "$client" || fail "no $machine"
done

# docs/README.md says that these are there.
mkdir /srv/snapshots && cp "$ARCHIVES"/{web-1,web-2,db,disk}.hexz /srv/snapshots
# The caller's environment must not affect the test.
unset HEXZ_PASSWORD RUST_LOG CREDENTIALS_DIRECTORY LISTEN_PID LISTEN_FDS NOTIFY_SOCKET WATCHDOG_USEC
export HOME=/run/home USER=root PATH="$TOOLS:/usr/sbin:/usr/bin:/sbin:/bin"
mkdir "$HOME/work"
cd "$HOME/work" || fail 'no folder'
cp "$ARCHIVES"/*.hexz .
# Paths in the documents are those of the repository.
ln -s "$REPOSITORY"/{benches,certs,examples,packaging,tests} .
# The Hexz tools, unless the page installs them. For that, pip needs no network.
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$REPOSITORY/target/hexz/wheels"
grep -qs 'venv hexz-tools' "$STEPS"/*.command || ln -s "$REPOSITORY/target/hexz" hexz-tools

# Object stores, if the page has some: their content is in /srv/store, and the credentials are where
# the vendors' tools keep them.
mkdir -p /srv/store/golden/v7 "$HOME/.aws"
cp "$ARCHIVES"/{base,snap}.hexz /srv/store/golden/v7
cp "$ARCHIVES/web-server.hexz" /srv/store/golden/web.hxz
umask 077
printf '[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n' > "$HOME/.aws/credentials"
umask 022
printf '[default]\nregion = eu-central-1\n' > "$HOME/.aws/config"
eval "STORES=/srv/store CA=$HOME/store-ca.pem $START_STORES > /run/stores 2>&1 &"
if [ "$START_STORES" != true ]; then
    for tries in $(seq 200); do [ -s "$HOME/store-ca.pem" ] && break; sleep 0.05; done
    [ -s "$HOME/store-ca.pem" ] || fail "no stores: $(cat /run/stores)"
    cat "$HOME/store-ca.pem" >> /etc/ssl/certs/ca-certificates.crt
    cp "$HOME/store-ca.pem" .
    # A bucket of another store, and the key of a service account.
    cp -r /srv/store/golden /srv/store/golden-copy
    openssl genrsa -out "$HOME/rsa.pem" 2048 2> /dev/null
    umask 077
    jq -n --rawfile key "$HOME/rsa.pem" '{type: "service_account", private_key_id: "1", private_key: $key,
        client_email: "gateway@example.iam.gserviceaccount.com"}' > gateway-key.json
    umask 022
fi

# An HTTP server, if the page has it: images.example.org, with a certificate that this machine trusts.
# The page may replace its configuration in /etc/nginx/conf.d.
if grep -qs 'images\.example\.org' "$STEPS"/*.command; then
    mkdir -p /srv/images/v7 /etc/nginx/conf.d /run/nginx /var/cache/nginx
    cp "$ARCHIVES"/{base,snap}.hexz /srv/images/v7 && cp "$ARCHIVES/web-server.hexz" /srv/images/v7/web.hxz
    hexz-nbd tree /srv/images/v7/base.hexz > /run/nginx/digests
    hexz-nbd pki --dir /run/nginx init > /run/nginx/pki && hexz-nbd pki --dir /run/nginx server \
        images.example.org >> /run/nginx/pki || fail 'no certificate'
    cat /run/nginx/ca-cert.pem >> /etc/ssl/certs/ca-certificates.crt
    cp /run/nginx/ca-cert.pem images-ca.pem
    temporary=$(for kind in client_body proxy fastcgi uwsgi scgi; do echo "${kind}_temp_path /run/nginx/$kind;"; done)
    cat > /etc/nginx/nginx.conf <<CONF
user root; pid /run/nginx.pid; error_log /run/nginx/error.log; events {}
http { access_log off; $temporary include /etc/nginx/conf.d/*.conf; }
CONF
    cat > /etc/nginx/conf.d/images.conf <<CONF
server {
    listen 443 ssl; ssl_protocols TLSv1.3; root /srv/images; location = /v7/private.hxz { return 403; }
    ssl_certificate /run/nginx/servers/images.example.org/server-cert.pem;
    ssl_certificate_key /run/nginx/servers/images.example.org/server-key.pem;
}
CONF
    nginx || fail 'no nginx'
fi

# Runs a step: its number, and the exit code that it must have.
run() {
    echo "$1" > "$STEPS/last"
    source "$STEPS/$1.command" < /dev/null > "$STEPS/$1.out" 2>&1
    code=$?
    [ $code = "$2" ] || { echo "it ended with $code instead of $2" > "$STEPS/$1.wrong"; exit 1; }
}

# Runs a command that shows what another process does, until it prints what the page shows.
observe() {
    for tries in $(seq 100); do
        echo "$1" > "$STEPS/last"
        source "$STEPS/$1.command" < /dev/null > "$STEPS/$1.out" 2>&1
        code=$?
        [ $code = "$2" ] && has_all "$1" && return
        sleep 0.1
    done
    # The output is compared later.
    [ $code = "$2" ] || { echo "it ended with $code instead of $2" > "$STEPS/$1.wrong"; exit 1; }
}

has_all() {
    while read -r line; do
        grep -qF -- "$line" "$STEPS/$1.out" || return 1
    done < "$STEPS/$1.fixed"
}

# Starts a server, which takes the place of the one before it.
serve() {
    end
    echo "$1" > "$STEPS/last"
    serving=$1
    eval "$(cat "$STEPS/$1.command") &" < /dev/null > "$STEPS/$1.out" 2>&1
    server=$!
    for tries in $(seq 400); do
        # The log may be in a file; some commands start a server themselves.
        grep -qsE 'ready|Serving until|Listening on' "$STEPS/$1.out" ./*.jsonl && return
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
    # It has to be running still, and to exit successfully.
    [ $code = 0 ] || { echo "it ended with $code" > "$STEPS/$serving.wrong"; exit 1; }
}

# Waits for lines in the servers' logs. They are compared at the end.
wait_for_log() {
    while read -r line; do said "$line"; done < "$STEPS/$1.fixed"
}

# Waits until a server's log contains a text.
said() {
    for tries in $(seq 200); do
        grep -qF -- "$1" "$STEPS"/*.out && return
        sleep 0.05
    done
    return 1
}

# Doesn't build anything; checks that make has the targets.
make() { command make --directory "$REPOSITORY" --dry-run "$@" > /dev/null; }

source "$STEPS/script"
end
