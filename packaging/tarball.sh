#!/bin/sh
# tarball.sh PROGRAM PREPARED TREE: creates TREE, the content of the archive with the static program,
# which has everything that the packages have. packaging/prepare.sh has created PREPARED.
set -eu
program=$1 prepared=$2 tree=$3

rm -rf "$tree"
mkdir -p "$tree/completions" "$tree/man" "$tree/systemd"
cp "$program" "$tree/hexz-nbd"
chmod 755 "$tree/hexz-nbd"
cp -R "$prepared/documents/." "$tree/"
cp examples/*.py "$tree/examples/"
chmod 755 "$tree"/examples/*.py
cp CHANGELOG.md LICENSE-APACHE LICENSE-MIT "$prepared/third-party.gz" "$tree/"
# The archive has no README of a distribution, but the page on which that is based.
sed 's|/usr/share/doc/hexz-nbd/README|docs/as-a-service.md|' "$prepared/hexz-nbd.toml" \
    > "$tree/hexz-nbd.toml"
cp "$prepared"/man/*.gz "$tree/man/"
cp "$prepared"/completions/* "$tree/completions/"
cp packaging/systemd/* "$tree/systemd/"
cp packaging/debian/logrotate "$tree/systemd/hexz-nbd.logrotate"
