#!/bin/sh
# Installs a package into a clean Debian root, and uses what it installed: run.sh PACKAGE.deb
#
# Takes root, for the root's own users and files. The root is made once, as
# target/package-root.tar. All else happens in namespaces, and ends with them.
set -eu
[ "$(id -u)" = 0 ] || { echo "$0 takes root; make package-test calls it by sudo"; exit 1; }
cd "$(dirname "$0")/../.."
package=$(readlink -f "$1")
base=$PWD/target/package-root.tar

tests/package/root.sh "$base"

started=$(date +%s)
ROOT=$base PACKAGE=$package ARCHIVES=$PWD/tests/archives \
    unshare --mount --net --pid --fork --kill-child sh tests/package/inside.sh
echo "the package was tested in $(($(date +%s) - started)) s"
