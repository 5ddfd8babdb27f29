#!/bin/sh
# prepare.sh PROGRAM FOLDER: creates in FOLDER what a package contains besides the program: manual
# pages, completions, the changelog, and the licenses of the crates.
set -eu
program=$1 folder=$2

rm -rf "$folder"
mkdir -p "$folder/completions"
"$program" man --dir "$folder/man"
gzip -9n "$folder"/man/*
for shell in bash zsh fish; do
    "$program" completions $shell > "$folder/completions/$shell"
done
gzip -9nc CHANGELOG.md > "$folder/changelog.gz"
packaging/third-party.py > "$folder/third-party"
gzip -9n "$folder/third-party"
# The same configuration, which names the first steps for this distribution.
sed 's|/README\.Debian|/README|' packaging/debian/hexz-nbd.toml > "$folder/hexz-nbd.toml"
