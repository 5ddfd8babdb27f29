#!/bin/sh
# Tries the Debian package under systemd, in a virtual machine: vm.sh PACKAGE.deb [TOPIC...]
#
# vm-inside.sh has the checks; each topic is one of its functions. The machine has no network, and
# its disk is made once, as target/vm/disk.raw, and not written to later. If QEMU isn't installed,
# its packages are unpacked into target/vm/qemu: to install them would replace a newer qemu-utils.
#
# Takes root, for the files of the disk. Environment:
#
#     ACCEL    tcg,thread=multi (emulation, the default) or kvm
#     LIMIT    time limit [30m]
set -eu
[ "$(id -u)" = 0 ] || { echo "$0 takes root; make vm-test calls it by sudo"; exit 1; }
package=$(readlink -f "$1")
shift
topics=$*
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
folder=$PWD/target/vm
disk=$folder/disk.raw
mkdir -p "$folder"

make_disk() {
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $release" \
        'Component: main' 'Created-By: Packages' | head -n 1)
    root=$(mktemp -d -p "$folder")
    trap 'rm -rf "$root"' EXIT
    # What is mounted meanwhile ends with the namespace.
    unshare --mount mmdebstrap --quiet --mode=root --variant=minbase \
        --aptopt='Apt::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --include=systemd-sysv,linux-image-cloud-amd64,initramfs-tools,dbus,libpam-systemd \
        --include=adduser,iproute2,kmod,libnbd-bin,logrotate,openssl,rsync,socat \
        "$release" "$root/debian" "$mirror"
    : > "$root/debian/etc/machine-id"
    echo vm > "$root/debian/etc/hostname"
    echo '/dev/vda / ext4 defaults 0 1' > "$root/debian/etc/fstab"
    printf '127.0.0.1 localhost\n::1 localhost\n' > "$root/debian/etc/hosts"
    # The console has only the results, and nothing else needs the processor.
    for unit in serial-getty@ttyS0.service apt-daily.timer apt-daily-upgrade.timer \
        dpkg-db-backup.timer e2scrub_all.timer fstrim.timer logrotate.timer; do
        ln -s /dev/null "$root/debian/etc/systemd/system/$unit"
    done
    cat > "$root/debian/etc/systemd/system/vm-test.service" << 'END'
[Unit]
Description=Checks of the package
After=multi-user.target

[Service]
Type=oneshot
RuntimeDirectory=vm-test
WorkingDirectory=/run/vm-test
ExecStart=/bin/sh -c 'tar -xf /dev/vdb && exec sh inside.sh > /dev/ttyS0 2>&1'
END
    mkdir -p "$root/debian/etc/systemd/system/multi-user.target.wants"
    ln -s ../vm-test.service "$root/debian/etc/systemd/system/multi-user.target.wants/"
    cp "$root/debian"/boot/vmlinuz-* "$folder/kernel"
    cp "$root/debian"/boot/initrd.img-* "$folder/initrd"
    truncate -s 2G "$disk.new"
    mke2fs -q -t ext4 -d "$root/debian" "$disk.new"
    mv "$disk.new" "$disk"
    rm -rf "$root"
    trap - EXIT
}

# With the libraries that it needs and that aren't installed.
unpack_qemu() {
    debs=$(mktemp -d -p "$folder")
    trap 'rm -rf "$debs" "$folder/qemu.new"' EXIT
    packages=$(apt-get -s install --no-install-recommends qemu-system-x86 \
        | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
    (cd "$debs" && apt-get -q download $packages > log 2>&1) || { cat "$debs/log"; exit 1; }
    for deb in "$debs"/*.deb; do
        dpkg -x "$deb" "$folder/qemu.new"
    done
    mv "$folder/qemu.new" "$folder/qemu"
    rm -rf "$debs"
    trap - EXIT
}

[ -e "$disk" ] || make_disk
set -- qemu-system-x86_64
if ! command -v "$1" > /dev/null; then
    [ -e "$folder/qemu" ] || unpack_qemu
    set -- env "LD_LIBRARY_PATH=$folder/qemu/usr/lib/x86_64-linux-gnu" \
        "QEMU_MODULE_DIR=$folder/qemu/usr/lib/x86_64-linux-gnu/qemu" \
        "$folder/qemu/usr/bin/qemu-system-x86_64" \
        -L "$folder/qemu/usr/share/qemu" -L "$folder/qemu/usr/share/seabios"
fi

payload=$(mktemp -d -p "$folder")
trap 'rm -rf "$payload"' EXIT
cp "$package" "$payload/package.deb"
cp tests/package/vm-inside.sh "$payload/inside.sh"
cp tests/archives/base-zstd.hxz tests/archives/encrypted-zstd.hxz target/packaging/README.Debian \
    docs/*.md examples/hexz-nbd-renew.* "$payload"
echo "$topics" > "$payload/topics"
tar -C "$payload" -cf "$payload.tar" .
trap 'rm -rf "$payload" "$payload.tar"' EXIT

# Emulated timers are late on a busy machine, and protection within the machine is slow.
fast='no_timer_check mitigations=off'
started=$(date +%s)
timeout "${LIMIT:-30m}" "$@" -machine pc -accel "${ACCEL:-tcg,thread=multi}" \
    -cpu max,la57=off -smp 2 -m 1024 \
    -display none -vga none -monitor none -nic none -device virtio-rng-pci -serial stdio \
    -kernel "$folder/kernel" -initrd "$folder/initrd" \
    -append "root=/dev/vda rw console=ttyS0 quiet loglevel=1 panic=1 systemd.show_status=0 $fast" \
    -drive "file=$disk,format=raw,if=virtio,snapshot=on" \
    -drive "file=$payload.tar,format=raw,if=virtio,readonly=on" < /dev/null \
    | sed -u 's/\r$//' | tee "$folder/log" \
    | grep --line-buffered -a '^\*\|^PASS\|^FAIL\|^     \|^checks:' || true
echo "the machine ran for $(($(date +%s) - started)) s; $folder/log has what it printed"
grep -q '^checks:' "$folder/log" || { echo "the checks didn't come to their end"; exit 1; }
grep -q '^checks: .* 0 failed$' "$folder/log"
