# What the tests of the packages have in common; each reads this file in mount, network and process
# namespaces of its own. The caller has set ROOT (a tar file), PACKAGE and ARCHIVES.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
unset RUST_LOG HEXZ_PASSWORD CREDENTIALS_DIRECTORY
root=/mnt/root
# Content of the archives base-zstd.hxz and encrypted-zstd.hxz.
SHA256=f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c

step() {
    echo "* $*"
}

fail() {
    echo "FAILED: $*"
    [ ! -s /mnt/log ] || { echo "the last log:"; cat /mnt/log; }
    exit 1
}

# Runs a command within the root.
inside() {
    chroot "$root" "$@"
}

# Waits until a command succeeds.
wait_for() {
    tries=0
    until "$@" > /dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 150 ] || fail "waited in vain for: $*"
        sleep 0.1
    done
}

# Unpacks the root.
create_root() {
    mount --make-rprivate /
    mount -t tmpfs -o size=2g none /mnt
    mkdir "$root"
    tar -C "$root" -xf "$ROOT"
    chmod 755 "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    mount -t proc proc /proc
    ip link set lo up
}

# check_version VERSION: of the program. Built from a checkout, it prints the commit, too.
check_version() {
    case "$(inside hexz-nbd --version)" in
        "hexz-nbd $1" | "hexz-nbd $1 ("*")") ;;
        *) fail "not version $1" ;;
    esac
}

# Checks the manual pages, and the documents with their pictures and examples.
check_documents() {
    for page in "$root"/usr/share/man/man[15]/hexz-nbd*; do
        text=$(inside mandoc -T utf8 -W warning,stop "${page#"$root"}") || fail "$page"
        [ ${#text} -gt 500 ] || fail "$page is next to empty"
    done
    [ -s "$root/usr/share/man/man5/hexz-nbd.toml.5.gz" ] || fail "no hexz-nbd.toml(5)"
    for file in README.md SECURITY.md changelog.gz docs/as-a-service.md docs/images/architecture.svg \
        docs/performance/table.md examples/hexz-nbd-renew.timer examples/compose/nginx.conf \
        examples/kubernetes/base/deployment.yaml examples/rules.toml; do
        [ -s "$root/usr/share/doc/hexz-nbd/$file" ] || fail "no $file"
        [ "$(stat -c %a "$root/usr/share/doc/hexz-nbd/$file")" = 644 ] || fail "the mode of $file"
    done
    [ -x "$root/usr/share/doc/hexz-nbd/examples/incremental-copy.py" ] || fail "the mode of a script"
    # The configuration names the README of the package, which is put together from two files.
    named=$(grep -o '/usr/share/doc/[^ ]*' "$root/etc/hexz-nbd/hexz-nbd.toml")
    grep -q 'systemctl reset-failed hexz-nbd.service' "$root$named" || fail "$named"
    ! grep -q @ "$root$named" || fail "$named isn't complete"
}
