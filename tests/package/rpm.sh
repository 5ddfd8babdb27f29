# The test of the RPM package, in mount, network and process namespaces of its own: whatever it
# mounts or starts ends with it. The caller gives ROOT (a tar file), PACKAGE and ARCHIVES.
. "${0%/*}/functions.sh"

create_root

# rpm of this machine, with a database in the root. What the package requires is there, but not
# recorded in that database.
rpm_in_root() {
    rpm --root "$root" --dbpath /var/lib/rpm "$@" > /mnt/rpm 2>&1 || { cat /mnt/rpm; fail "rpm $*"; }
    # Scriptlets that fail are only reported.
    ! grep -qi 'scriptlet failed\|error:' /mnt/rpm || { cat /mnt/rpm; fail "rpm $*"; }
}

step "the package names what it requires, and no library"
rpm_in_root --query --requires --package "$PACKAGE"
grep -qx '/usr/sbin/useradd' /mnt/rpm || fail "it doesn't require useradd"
! grep -q '\.so' /mnt/rpm || fail "it requires libraries"
while read -r required; do
    case $required in
        /*) [ -x "$root$required" ] || fail "the root lacks $required" ;;
    esac
done < /mnt/rpm

step "it is installed"
rpm_in_root --install --nodeps "$PACKAGE"
inside getent passwd hexz-nbd | grep -q ':/usr/sbin/nologin$' || fail "no user, or one with a shell"
[ "$(stat -c '%A' "$root/var/lib/hexz-nbd")" = drwxr-x--- ] || fail "/var/lib/hexz-nbd"
[ "$(inside stat -c '%U:%G' /var/lib/hexz-nbd)" = root:hexz-nbd ] || fail "/var/lib/hexz-nbd"
[ "$(inside stat -c '%U:%G:%A' /var/log/hexz-nbd)" = hexz-nbd:hexz-nbd:drwxr-x--- ] \
    || fail "/var/log/hexz-nbd"
! find "$root/etc/systemd" -name 'hexz-nbd*' 2> /dev/null | grep -q . || fail "a unit is enabled"
rpm_in_root --verify --nodeps hexz-nbd
[ ! -s /mnt/rpm ] || { cat /mnt/rpm; fail "files differ from the package"; }
rpm_in_root --query --queryformat '%{VERSION}' hexz-nbd
check_version "$(cat /mnt/rpm)"
check_documents
for file in usr/share/bash-completion/completions/hexz-nbd usr/share/zsh/site-functions/_hexz-nbd \
    usr/share/fish/vendor_completions.d/hexz-nbd.fish usr/share/licenses/hexz-nbd/LICENSE-MIT \
    usr/lib/systemd/system/hexz-nbd.socket etc/logrotate.d/hexz-nbd; do
    [ -s "$root/$file" ] || fail "no $file"
done

step "as the unit starts it, it serves"
unit=$root/usr/lib/systemd/system/hexz-nbd.service
line=$(sed -n 's/^ExecStart=//p' "$unit")
user=$(sed -n 's/^User=//p' "$unit")
group=$(sed -n 's/^Group=//p' "$unit")
# RuntimeDirectory= of the unit.
mkdir -p "$root/run/hexz-nbd"
inside chown "$user:$group" /run/hexz-nbd
install -m 0640 "$ARCHIVES"/base-zstd.hxz "$root/var/lib/hexz-nbd/"
inside chgrp "$group" /var/lib/hexz-nbd/base-zstd.hxz
inside runuser -u "$user" -- $line --check-config > /mnt/log 2>&1 || fail "--check-config"
setpriv --no-new-privs chroot --userspec="$user:$group" "$root" $line > /mnt/log 2>&1 &
server=$!
wait_for grep -q 'ready: ' /mnt/log
found=$(nbdcopy nbd://localhost/base-zstd.hxz - | sha256sum | cut -d' ' -f1)
[ "$found" = $SHA256 ] || fail "wrong bytes"
kill -TERM "$server"
wait "$server" || fail "it ended with $?"

step "it is installed again, as by an upgrade: what was changed in its configuration stays"
echo '#' >> "$root/etc/hexz-nbd/hexz-nbd.toml"
changed=$(sha256sum < "$root/etc/hexz-nbd/hexz-nbd.toml")
rpm_in_root --upgrade --nodeps --replacepkgs "$PACKAGE"
[ "$(sha256sum < "$root/etc/hexz-nbd/hexz-nbd.toml")" = "$changed" ] || fail "the configuration"

step "it is removed: snapshots, the changed configuration and the user stay"
rpm_in_root --erase hexz-nbd
[ ! -e "$root/usr/bin/hexz-nbd" ] || fail "the program is still there"
[ "$(sha256sum < "$root/etc/hexz-nbd/hexz-nbd.toml.rpmsave")" = "$changed" ] || fail "the configuration"
[ -s "$root/var/lib/hexz-nbd/base-zstd.hxz" ] || fail "a snapshot is gone"
inside getent passwd hexz-nbd > /dev/null || fail "the user is gone"
! find "$root/usr" -name '*hexz-nbd*' | grep . || fail "files are left"
