#!/bin/sh
# documents.sh FOLDER: copies into FOLDER the documents, with their pictures, and the examples, for
# all packages and the archive. The relative links of README.md, SECURITY.md and docs lead to files
# in there, or to examples/*.py, which packages contain with another mode.
set -eu
folder=$1

rm -rf "$folder"
mkdir -p "$folder"
# Not the figures behind the pictures, nor the keys and archives that someone has put beside
# compose.yml.
find README.md SECURITY.md docs examples -type f ! -name '.*' ! -name '*.py' ! -name '*.pyc' \
    ! -path docs/performance/results.json ! -path 'examples/compose/*/*' -print \
    | while read -r file; do
        mkdir -p "$folder/${file%"${file##*/}"}"
        cp "$file" "$folder/$file"
    done
# Whatever the umask is.
chmod -R u=rwX,go=rX "$folder"
find "$folder" -type f -exec chmod 644 {} +
