#!/bin/sh
# prepare.sh PROGRAM FOLDER: creates in FOLDER what a package contains besides the program: manual
# pages, completions, documents, the changelog, and the licenses of the crates.
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
packaging/documents.sh "$folder/documents"

# readme TEMPLATE NAME: inserts what all packages with units have in common.
readme() {
    sed -e '/^@first-steps@$/r packaging/first-steps' -e '//d' "$1" > "$folder/$2"
}
readme packaging/debian/README.Debian README.Debian
readme packaging/rpm/README README.rpm
readme packaging/arch/README README.arch
# The same configuration, which names the first steps for other distributions.
sed 's|/README\.Debian|/README|' packaging/debian/hexz-nbd.toml > "$folder/hexz-nbd.toml"
