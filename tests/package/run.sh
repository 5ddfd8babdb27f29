#!/bin/sh
# Installs a package into a clean Debian root, and uses what it installed: run.sh PACKAGE.deb
#
# Takes root, for the root's own users and files. The root is the running Debian's release,
# from the mirror that this machine's apt has; it is made once, as target/package-root.tar.
# All else happens in namespaces, and ends with them.
set -eu
[ "$(id -u)" = 0 ] || { echo "$0 takes root; make package-test calls it by sudo"; exit 1; }
cd "$(dirname "$0")/../.."
package=$(readlink -f "$1")
base=$PWD/target/package-root.tar

seconds() {
    echo $(($(date +%s) - started))
}

if [ ! -e "$base" ]; then
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
    rm -rf "$root"
    trap - EXIT
    echo "a Debian root was made in $(seconds) s"
fi

started=$(date +%s)
ROOT=$base PACKAGE=$package ARCHIVES=$PWD/tests/archives \
    unshare --mount --net --pid --fork --kill-child sh tests/package/inside.sh
echo "the package was tested in $(seconds) s"
