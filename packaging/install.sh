#!/bin/sh
# install.sh PROGRAM PREPARED ROOT: installs below ROOT what a package contains on every
# distribution: program, configuration, manual pages, completions, documents and licenses. The rest,
# such as units, is installed by the recipes. packaging/prepare.sh has created PREPARED.
set -eu
program=$1 prepared=$2 root=$3
doc=$root/usr/share/doc/hexz-nbd

install -Dm755 "$program" "$root/usr/bin/hexz-nbd"
install -Dm644 "$prepared/hexz-nbd.toml" -t "$root/etc/hexz-nbd/"
install -Dm644 "$prepared"/man/*.1.gz -t "$root/usr/share/man/man1/"
install -Dm644 "$prepared"/man/*.5.gz -t "$root/usr/share/man/man5/"
install -Dm644 "$prepared/completions/bash" "$root/usr/share/bash-completion/completions/hexz-nbd"
install -Dm644 "$prepared/completions/zsh" "$root/usr/share/zsh/site-functions/_hexz-nbd"
install -Dm644 "$prepared/completions/fish" \
    "$root/usr/share/fish/vendor_completions.d/hexz-nbd.fish"
install -d "$doc"
cp -R "$prepared/documents/." "$doc/"
install -Dm755 examples/*.py -t "$doc/examples/"
install -Dm644 "$prepared/changelog.gz" -t "$doc/"
install -Dm644 LICENSE-APACHE LICENSE-MIT "$prepared/third-party.gz" \
    -t "$root/usr/share/licenses/hexz-nbd/"
