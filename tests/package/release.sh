#!/bin/sh
# Installs and uses what `make release` has built for this machine: release.sh FOLDER
#
# The RPM package is installed into the clean Debian root of run.sh, by rpm: that root has the shell,
# the tools for users and the file system layout that the package needs. The image is unpacked, and
# its program runs in it. Takes root. All else happens in namespaces, and ends with them.
set -eu
[ "$(id -u)" = 0 ] || { echo "$0 takes root; make release-test calls it by sudo"; exit 1; }
cd "$(dirname "$0")/../.."
folder=$(readlink -f "$1")
arch=$(uname -m)
package=$(ls "$folder"/hexz-nbd-*."$arch".rpm)
image=$(ls "$folder"/hexz-nbd-*-"$arch"-container.tar)

(cd "$folder" && sha256sum --check --quiet ./*-"$arch".sha256)
echo "the checksums are right"

tests/package/root.sh target/package-root.tar

started=$(date +%s)
ROOT=$PWD/target/package-root.tar PACKAGE=$package ARCHIVES=$PWD/tests/archives \
    unshare --mount --net --pid --fork --kill-child sh tests/package/rpm.sh
echo "the RPM package was tested in $(($(date +%s) - started)) s"

started=$(date +%s)
unshare --mount --net --pid --fork --kill-child --mount-proc \
    python3 tests/package/image.py "$image" tests/archives
echo "the image was tested in $(($(date +%s) - started)) s"

tests/package/recipes.sh target/static/hexz-nbd
