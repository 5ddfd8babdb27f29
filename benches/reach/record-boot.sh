#!/bin/sh
# Records the disk reads of a booting virtual machine, in the form of benches/reach/boot.trace:
#
#     benches/reach/record-boot.sh FOLDER TRACE
#
# FOLDER gets the image, disk.raw, unless it is there already: Debian 12 with systemd, OpenSSH,
# nginx, PostgreSQL, and packages that the boot doesn't read. GRUB boots it, so the kernel and the
# initramfs are read from the disk too. Writes go to nbdkit's cow filter: the image stays as it is.
#
# Needs root, mmdebstrap, mke2fs, nbdkit, qemu-system-x86_64, python3, 6 GiB of disk space and a
# Debian mirror. Environment:
#
#     QEMU     the emulator and options for it [qemu-system-x86_64]
#     ACCEL    kvm, or tcg if the machine has no KVM [kvm]
#     LOGIN    scale times so that the login prompt is at this second, since tcg is slow
#     IDLE     seconds to record after the login prompt [120]
set -eu
test $# = 2 || { echo "usage: $0 FOLDER TRACE" >&2; exit 2; }
mkdir -p "$1"
folder=$(realpath "$1")
image=$folder/disk.raw
root=$folder/root
uuid=5c5b1c0e-7a10-4d5e-9f5e-0d2f6a5b7c11
export PATH="$PATH:/usr/sbin:/sbin"

make_root() {
	mmdebstrap --mode=root --aptopt='Apt::Install-Recommends "false"' \
		--include=systemd-sysv,linux-image-cloud-amd64,initramfs-tools,grub-pc-bin,dbus \
		--include=libpam-systemd,ifupdown,isc-dhcp-client,chrony,rsyslog,cron,locales,sudo \
		--include=openssh-server,nginx,postgresql,unattended-upgrades,ca-certificates,curl \
		--include=vim,git,build-essential,gdb,python3-venv,man-db,bash-completion,perl-doc \
		--include=default-jre-headless bookworm "$root"
	echo vm >"$root/etc/hostname"
	: >"$root/etc/machine-id"
	echo "UUID=$uuid / ext4 errors=remount-ro 0 1" >"$root/etc/fstab"
	printf 'auto lo\niface lo inet loopback\nallow-hotplug ens3\niface ens3 inet dhcp\n' \
		>"$root/etc/network/interfaces"
	mkdir -p "$root/boot/grub/i386-pc"
	cp "$root"/usr/lib/grub/i386-pc/*.mod "$root"/usr/lib/grub/i386-pc/*.lst \
		"$root/boot/grub/i386-pc"
	chroot "$root" grub-mkimage -O i386-pc -o /boot/grub/i386-pc/core.img \
		-p '(hd0,msdos1)/boot/grub' biosdisk part_msdos ext2
	printf 'linux /vmlinuz root=UUID=%s ro console=ttyS0\ninitrd /initrd.img\nboot\n' "$uuid" \
		>"$root/boot/grub/grub.cfg"
}

# GRUB in the first MiB, a partition with ext4 behind it: 2 GiB.
make_image() {
	rm -f "$image.unfinished"
	truncate -s 2147483648 "$image.unfinished"
	mke2fs -q -t ext4 -U "$uuid" -d "$root" -O ^metadata_csum_seed,^orphan_file \
		-E offset=1048576,lazy_itable_init=0,lazy_journal_init=0 "$image.unfinished" 2096128k
	write() { dd of="$image.unfinished" bs=1 seek="$1" conv=notrunc status=none; }
	head -c 440 "$root/usr/lib/grub/i386-pc/boot.img" | write 0
	# Bootable, Linux, sectors 2048 to 4194303.
	printf '\200\376\377\377\203\376\377\377\000\010\000\000\000\370\077\000' | write 446
	printf '\125\252' | write 510
	write 512 <"$root/boot/grub/i386-pc/core.img"
	mv "$image.unfinished" "$image"
}

# Boots until the login prompt and IDLE seconds more.
boot() {
	rm -f "$folder/reads.log" "$folder/serial.log"
	timeout 1800 nbdkit --foreground --unix "$folder/socket" --filter=log --filter=cow \
		file "$image" logfile="$folder/reads.log" &
	nbdkit=$!
	qemu=
	trap 'kill $qemu $nbdkit 2>/dev/null || true; wait; rm -f "$folder/socket"' EXIT
	until test -S "$folder/socket"; do sleep 0.1; done
	timeout 1800 ${QEMU:-qemu-system-x86_64} -machine pc -accel "${ACCEL:-kvm}" -smp 2 -m 1024 \
		-display none -monitor none -serial "file:$folder/serial.log" -no-reboot \
		-drive "file=nbd:unix:$folder/socket,format=raw,if=virtio" -device virtio-rng-pci \
		-netdev user,id=net,restrict=on -device virtio-net-pci,netdev=net,romfile= &
	qemu=$!
	until grep -q 'login:' "$folder/serial.log" 2>/dev/null; do
		kill -0 "$qemu" || { echo "the machine doesn't boot" >&2; exit 1; }
		sleep 0.2
	done
	login=$(date '+%F %T.%N' | cut -c 1-26)
	sleep "${IDLE:-120}"
}

test -e "$root/boot/grub/grub.cfg" || test -e "$image" || make_root
test -e "$image" || make_image
boot
python3 - "$folder/reads.log" "$login" "${LOGIN-}" >"$2" <<'END'
import re, sys
from datetime import datetime

GRAIN, PAGE = 65536, 4096
CALL = re.compile(r"(\S+ \S+) connection=\d+ (Read|Write|Zero|Trim) .*offset=(\S+) count=(\S+)")
login = datetime.fromisoformat(sys.argv[2])
start, lines, used, written = None, [], set(), set()
for time, kind, *numbers in (call.groups() for call in map(CALL.match, open(sys.argv[1])) if call):
    offset, length = (int(number, 16) for number in numbers)
    pages = range(offset // PAGE, (offset + length - 1) // PAGE + 1)
    if kind != "Read":
        written.update(pages)
        continue
    time = datetime.fromisoformat(time)
    if start is None:
        start = time
        duration = (login - start).total_seconds()
        factor = duration / float(sys.argv[3] or duration)
    ms = int((time - start).total_seconds() * 1000 / factor)
    # What the machine has written itself isn't read from the image.
    grains = {page * PAGE // GRAIN * GRAIN for page in pages if page not in written}
    for at in sorted(grains - used):
        used.add(at)
        if lines and lines[-1][0] + lines[-1][1] == at and ms - lines[-1][2] <= 10:
            lines[-1][1] += GRAIN
        else:
            lines.append([at, GRAIN, ms])
print("hexz-trace 1\nexport boot main 2147483648")
for line in lines:
    print(*line)
print(f"login prompt after {duration:.1f} s, times divided by {factor:.2f}", file=sys.stderr)
END
