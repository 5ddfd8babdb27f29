#!/bin/sh
# Creates a clean root of the running Debian's release, from the mirror that this machine's apt has,
# unless it exists: root.sh TAR. Takes root.
set -eu
base=$1
[ ! -e "$base" ] || exit 0
started=$(date +%s)
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $release" 'Component: main' \
    'Created-By: Packages' | head -n 1)
root=$(mktemp -d -p /var/tmp)
trap 'rm -rf "$root"' EXIT
# Debian's smallest, and a reader of manual pages. What is mounted meanwhile ends with the
# namespace.
unshare --mount debootstrap --variant=minbase --include=mandoc \
    "$release" "$root" "$mirror" > "$base.log" || { tail "$base.log"; exit 1; }
tar -C "$root" --one-file-system -cf "$base.new" .
mv "$base.new" "$base"
echo "a Debian root was made in $(($(date +%s) - started)) s"
