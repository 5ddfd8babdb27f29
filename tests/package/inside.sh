# The test of the Debian package, in mount, network and process namespaces of its own: whatever it
# mounts or starts ends with it. The caller gives ROOT (a tar file), PACKAGE and ARCHIVES.
. "${0%/*}/functions.sh"

# All files but dpkg's own notes, and copies and locks of the files of users.
files() {
    (cd "$root" && find . -xdev \( -path ./proc -o -path ./dev -o -path ./sys -o -path ./run \
        -o -path ./var/lib/dpkg -o -path ./var/cache \) -prune -o -print) \
        | grep -vE '^\./(etc/(passwd|group|shadow|gshadow|subuid|subgid)-|etc/\.pwd\.lock|var/log/(dpkg|alternatives)\.log)$' \
        | sort
}

create_root
files > /mnt/before
cut -d: -f1 "$root/etc/passwd" > /mnt/users

# With what it depends on being there: a clean root has all of that.
install_package() {
    cp "$PACKAGE" "$root/tmp/package.deb"
    inside dpkg -i /tmp/package.deb > /mnt/dpkg 2>&1 || { cat /mnt/dpkg; fail "dpkg -i"; }
    rm "$root/tmp/package.deb"
}

step "it is installed, by dpkg alone"
install_package
inside getent passwd hexz-nbd | grep -q ':/usr/sbin/nologin$' || fail "no user, or one with a shell"
[ "$(stat -c '%U:%A' "$root/var/lib/hexz-nbd")" = 'root:drwxr-x---' ] || fail "/var/lib/hexz-nbd"
[ "$(inside stat -c '%U:%G:%A' /var/log/hexz-nbd)" = 'hexz-nbd:hexz-nbd:drwxr-x---' ] \
    || fail "/var/log/hexz-nbd"
! find "$root/etc/systemd" -name 'hexz-nbd*' | grep -q . || fail "a unit is enabled"
version=$(inside dpkg-query -W -f '${Version}' hexz-nbd)
check_version "${version%-*}"

step "its manual pages and documents can be read there"
check_documents

# The unit's command line, user and folder for sockets.
unit=$root/lib/systemd/system/hexz-nbd.service
line=$(sed -n 's/^ExecStart=//p' "$unit")
reload=$(sed -n 's/^ExecReload=//p' "$unit")
user=$(sed -n 's/^User=//p' "$unit")
group=$(sed -n 's/^Group=//p' "$unit")
[ -n "$line" ] && [ -n "$reload" ] && [ -n "$user" ] && [ -n "$group" ] \
    || fail "the unit lacks something"
runtime=$root/run/hexz-nbd
mkdir -p "$runtime"
inside chown "$user:$group" /run/hexz-nbd
credentials=/run/credentials/hexz-nbd.service
mkdir -p "$root$credentials"

# Runs the unit's command line as its user, behind another command (or "env").
start() {
    CREDENTIALS_DIRECTORY=$credentials "$@" setpriv --no-new-privs \
        chroot --userspec="$user:$group" "$root" $line > /mnt/log 2>&1 &
    server=$!
}

ready() {
    grep -q 'ready: ' /mnt/log
}

# Ends it as the service manager does.
stop() {
    kill -TERM "$server"
    code=0
    wait "$server" || code=$?
    [ "$code" = 0 ] || fail "it ended with $code"
}

# Runs the unit's reload as its user, without credentials.
reload() {
    setpriv --no-new-privs chroot --userspec="$user:$group" "$root" $reload > /mnt/reload 2>&1
}

disk() {
    nbdcopy "$1" - | sha256sum | cut -d' ' -f1
}

step "as it is installed, it starts with nothing to serve, for this machine alone"
start env
wait_for ready
grep -q 'without TLS to this machine only' /mnt/log || fail "to whom does it serve?"
[ "$(nbdinfo --list --json nbd://localhost | grep -c export-name)" = 0 ] || fail "it serves something"
stop

step "certificates are made by what was installed"
pki() {
    inside hexz-nbd pki --dir /root/pki "$@" > /dev/null
}
pki init
pki server localhost
pki client backup.example.org
cp -a "$root/root/pki/clients/backup.example.org" /mnt/client
install -m 0644 "$root/root/pki/servers/localhost/server-cert.pem" "$root/root/pki/crl.pem" \
    "$root/root/pki/ca-cert.pem" "$root/etc/hexz-nbd/"
inside install -o root -g "$group" -m 0640 /root/pki/servers/localhost/server-key.pem /etc/hexz-nbd/
install -m 0640 "$ARCHIVES"/base-zstd.hxz "$ARCHIVES"/encrypted-zstd.hxz "$root/var/lib/hexz-nbd/"
inside chown -R "root:$group" /var/lib/hexz-nbd
cat >> "$root/etc/hexz-nbd/hexz-nbd.toml" << END
tls-cert = "/etc/hexz-nbd/server-cert.pem"
tls-key = "/etc/hexz-nbd/server-key.pem"
tls-client-ca = "/etc/hexz-nbd/ca-cert.pem"
tls-client-crl = "/etc/hexz-nbd/crl.pem"
audit = "/var/log/hexz-nbd/audit.jsonl"
END
printf 'correct horse battery staple' > "$root$credentials/hexz-nbd.password"
inside chown -R "$user:$group" "$credentials"
chmod -R u=rX,go= "$root$credentials"
inside setpriv --reuid="$user" --regid="$group" --clear-groups \
    env CREDENTIALS_DIRECTORY="$credentials" $line --check-config > /mnt/log 2>&1 || fail "--check-config"

# This is no service manager: the program would log only warnings, as for a client that starts it.
step "it is started by sockets, and read through them"
start systemd-socket-activate -l 127.0.0.1:10809 -l "$runtime/nbd.sock" \
    --setenv=CREDENTIALS_DIRECTORY --setenv=RUST_LOG=info
uri='nbds://localhost/base-zstd.hxz?tls-certificates=/mnt/client'
wait_for test -S "$runtime/nbd.sock"
[ "$(disk "$uri")" = $SHA256 ] || fail "wrong bytes by TCP"
uri_unix="nbds+unix://localhost/encrypted-zstd.hxz?socket=$runtime/nbd.sock&tls-certificates=/mnt/client"
[ "$(disk "$uri_unix")" = $SHA256 ] || fail "wrong bytes by the Unix socket"
ready || fail "it doesn't say that it is ready"
mkdir /mnt/nobody
cp /mnt/client/ca-cert.pem /mnt/nobody
! nbdinfo 'nbds://localhost/base-zstd.hxz?tls-certificates=/mnt/nobody' > /mnt/refused 2>&1 \
    || fail "it lets in who has no certificate"

step "it is reloaded: whose certificate was revoked stays out"
pki revoke backup.example.org
cp "$root/root/pki/crl.pem" "$root/etc/hexz-nbd/"
reload || { cat /mnt/reload; fail "the reload"; }
grep -q 'changed files: /etc/hexz-nbd/crl.pem' /mnt/reload || fail "it doesn't say what changed"
! nbdinfo "$uri" > /mnt/refused 2>&1 || fail "it lets in whose certificate was revoked"

step "a reload that it rejects fails, and changes nothing"
cp -a "$root/etc/hexz-nbd/hexz-nbd.toml" /mnt/sound
echo 'nonsense = 1' >> "$root/etc/hexz-nbd/hexz-nbd.toml"
code=0
reload || code=$?
[ "$code" = 2 ] || fail "the reload ended with $code"
grep -q config_unknown_option /mnt/reload || fail "it doesn't say what is wrong"
cp -a /mnt/sound "$root/etc/hexz-nbd/hexz-nbd.toml"
kill -0 "$server" || fail "it has ended"

step "it is stopped"
stop

step "it is installed once more: what was changed in its configuration stays"
changed=$(sha256sum < "$root/etc/hexz-nbd/hexz-nbd.toml")
install_package
[ "$(sha256sum < "$root/etc/hexz-nbd/hexz-nbd.toml")" = "$changed" ] || fail "the configuration"
[ "$(stat -c '%U:%A' "$root/var/lib/hexz-nbd")" = 'root:drwxr-x---' ] || fail "/var/lib/hexz-nbd"

step "it is removed: its configuration stays"
inside dpkg -r hexz-nbd > /mnt/dpkg 2>&1 || { cat /mnt/dpkg; fail "dpkg -r"; }
[ -e "$root/etc/hexz-nbd/hexz-nbd.toml" ] || fail "the configuration is gone"
[ ! -e "$root/usr/bin/hexz-nbd" ] || fail "the program is still there"

purge() {
    inside dpkg -P hexz-nbd > /mnt/dpkg 2>&1 || { cat /mnt/dpkg; fail "dpkg -P"; }
}
key=/etc/hexz-nbd/server-key.pem

step "it is purged: no later group can read the key that stays"
purge
[ -s "$root/var/lib/hexz-nbd/base-zstd.hxz" ] || fail "a snapshot is gone"
[ ! -e "$root/var/log/hexz-nbd" ] || fail "the audit stays"
inside addgroup --quiet --system other
[ "$(inside stat -c %G "$key")" = "$group" ] || fail "the key belongs to $(inside stat -c %G "$key")"
inside delgroup --quiet --system other

step "it is installed again: the key can be read"
install_package
inside setpriv --reuid="$user" --regid="$group" --clear-groups cat "$key" > /dev/null || fail "the key"

step "it is installed after user and group have had other numbers: they get back what is theirs"
snapshot=/var/lib/hexz-nbd/base-zstd.hxz
log=/var/log/hexz-nbd/audit.jsonl.1
foreign=/etc/hexz-nbd/foreign.pem
inside touch "$log" "$foreign"
inside chgrp 54321 "$key" /var/lib/hexz-nbd
inside chown 54321:54321 /var/log/hexz-nbd "$log" "$foreign" "$snapshot"
install_package
owner() {
    inside stat -c %U:%G "$1"
}
[ "$(owner "$key")" = "root:$group" ] || fail "the key isn't repaired"
[ "$(owner /var/lib/hexz-nbd)" = "root:$group" ] || fail "the folder of snapshots isn't repaired"
for file in /var/log/hexz-nbd "$log"; do
    [ "$(owner "$file")" = "$user:$group" ] || fail "$file isn't repaired"
done

step "what others have put there stays theirs"
for file in "$snapshot" "$foreign"; do
    [ "$(inside stat -c %u:%g "$file")" = 54321:54321 ] || fail "$file belongs to $(owner "$file")"
done

step "it is purged: nothing stays but user and group, snapshots and what the operator has made"
rm -r "$root/etc/hexz-nbd"/*.pem "$root/root/pki" "$root/run/hexz-nbd" "$root/run/credentials"
purge
rm -r "$root/var/lib/hexz-nbd"
files > /mnt/after
diff /mnt/before /mnt/after || fail "something is left behind"
echo hexz-nbd >> /mnt/users
cut -d: -f1 "$root/etc/passwd" | diff /mnt/users - || fail "other users"
