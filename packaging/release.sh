#!/bin/sh
# release.sh ARCH VERSION: collects what was built (`make release`) in target/release-artifacts, and
# adds the archives of the program and of the source, the SBOM, and checksums. For the same commit
# and the same tools, the archives and the SBOM are the same to the last byte.
set -eu
arch=$1 version=$2
target=$arch-unknown-linux-musl
name=hexz-nbd-$version-$arch
# What was released for other processors stays.
output=target/release-artifacts/new

rm -rf "$output"
mkdir -p "$output"
epoch=${SOURCE_DATE_EPOCH:-$(date +%s)}
export SOURCE_DATE_EPOCH="$epoch"

# FOLDER NAME: archives target/FOLDER/NAME.
archive() {
    tar -C "target/$1" --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
        --mtime="@$epoch" -cf - "$2" | gzip -9n > "$output/$2.tar.gz"
}

rm -rf target/tarball
packaging/tarball.sh target/static/hexz-nbd target/packaging "target/tarball/$name"
archive tarball "$name"

# The source, as it is committed.
if git rev-parse --verify --quiet HEAD > /dev/null; then
    git archive --format=tar --prefix="hexz-nbd-$version/" HEAD \
        | gzip -9n > "$output/hexz-nbd-$version-source.tar.gz"
fi

# The packages and the image. There is a Debian package only for the building machine.
case $arch in
    x86_64) debian=amd64 ;;
    aarch64) debian=arm64 ;;
    *) debian=$arch ;;
esac
for package in "target/debian/hexz-nbd_${version}"-*"_$debian.deb" \
    "target/generate-rpm/hexz-nbd-$version"-*".$arch.rpm"; do
    [ ! -e "$package" ] || cp "$package" "$output/"
done
buildah push --quiet --format oci "hexz-nbd:$version" \
    "oci-archive:$output/$name-container.tar:hexz-nbd:$version"

packaging/sbom.py "$target" > "$output/$name.cdx.json"

(cd "$output" && sha256sum -- hexz-nbd* > ../sums)
mv target/release-artifacts/sums "$output/$name.sha256"
mv "$output"/* target/release-artifacts/
rmdir "$output"
ls -l target/release-artifacts
