#!/bin/sh
# container.sh PROGRAM FOLDER: creates in FOLDER what the image contains, for
# packaging/Containerfile.
set -eu
program=$1 folder=$2
certificates=/etc/ssl/certs/ca-certificates.crt

[ -s "$certificates" ] || { echo "$certificates is missing: install ca-certificates" >&2; exit 1; }
rm -rf "$folder"
root=$folder/root
mkdir -p "$root/etc/hexz-nbd" "$root/etc/ssl/certs" "$root/licenses" "$root/snapshots" "$root/tls" \
    "$folder/cache"
cp "$program" "$root/hexz-nbd"
cp "$certificates" "$root/etc/ssl/certs/"
cp LICENSE-APACHE LICENSE-MIT "$root/licenses/"
packaging/third-party.py > "$root/licenses/third-party"
# Whatever the umask is.
chmod -R u=rwX,go=rX "$folder"
chmod 755 "$root/hexz-nbd"
