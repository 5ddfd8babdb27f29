#!/bin/sh
# image.sh ARCH VERSION: builds the image hexz-nbd from target/container with buildah, and labels it.
set -eu
case $1 in
    x86_64) platform=linux/amd64 ;;
    aarch64) platform=linux/arm64 ;;
    *) platform=linux/$1 ;;
esac
version=$2

set -- --label "org.opencontainers.image.version=$version"
if revision=$(git rev-parse HEAD 2> /dev/null); then
    set -- "$@" --label "org.opencontainers.image.revision=$revision"
fi
# `repository` of Cargo.toml, if it has one.
repository=$(cargo metadata --locked --no-deps --format-version 1 \
    | python3 -c 'import json, sys
print(next(p["repository"] or "" for p in json.load(sys.stdin)["packages"] if p["name"] == "hexz-nbd"))')
if [ -n "$repository" ]; then
    set -- "$@" --label "org.opencontainers.image.source=$repository" \
        --label "org.opencontainers.image.documentation=$repository/tree/v$version/docs"
fi
# The docker format has health checks.
exec buildah build --isolation chroot --platform "$platform" --format docker \
    --timestamp "${SOURCE_DATE_EPOCH:-$(date +%s)}" "$@" \
    -t hexz-nbd -t "hexz-nbd:$version" -f packaging/Containerfile target/container
