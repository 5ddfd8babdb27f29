#!/bin/bash
# Checks the recipes for Arch and Alpine as far as that works on Debian, with a program that was
# built before: recipes.sh PROGRAM. It parses them, and runs their package(), without build() and the
# tools of these distributions. makepkg, which Debian has, reads the PKGBUILD; it takes root, since
# makepkg runs as another user only. pacman is not needed for that.
set -eu
program=$(readlink -f "$1")
cd "$(dirname "$0")/../.."
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"

fail() {
    echo "FAILED: $*"
    exit 1
}

# The source as after build().
unpacked=$folder/src/hexz-nbd-$version
mkdir -p "$unpacked/target/release"
git archive HEAD | tar -C "$unpacked" -xf -
cp "$program" "$unpacked/target/release/hexz-nbd"

bash -n packaging/arch/PKGBUILD
shellcheck --shell bash --exclude SC2034,SC2154,SC2164 packaging/arch/PKGBUILD
shellcheck --shell sh --exclude SC2034,SC2154 packaging/alpine/APKBUILD packaging/alpine/hexz-nbd.initd
shellcheck packaging/alpine/hexz-nbd.pre-install packaging/*.sh packaging/rpm/scripts/*
for recipe in packaging/arch/PKGBUILD packaging/alpine/APKBUILD; do
    grep -qx "pkgver=$version" "$recipe" || fail "$recipe isn't for version $version"
done

# What both must install, besides what tells how to start it.
expected() {
    cat << ENDOFLIST
etc/hexz-nbd/hexz-nbd.toml
etc/logrotate.d/hexz-nbd
usr/bin/hexz-nbd
usr/share/bash-completion/completions/hexz-nbd
usr/share/doc/hexz-nbd/docs/as-a-service.md
usr/share/doc/hexz-nbd/docs/images/architecture.svg
usr/share/doc/hexz-nbd/examples/hexz-nbd-renew.timer
usr/share/doc/hexz-nbd/examples/hexz-nbd.toml
usr/share/fish/vendor_completions.d/hexz-nbd.fish
usr/share/licenses/hexz-nbd/LICENSE-MIT
usr/share/licenses/hexz-nbd/third-party.gz
usr/share/man/man1/hexz-nbd.1.gz
usr/share/man/man5/hexz-nbd.toml.5.gz
usr/share/zsh/site-functions/_hexz-nbd
ENDOFLIST
}

# check RECIPE FOLDER: what package() has installed into FOLDER.
check() {
    (cd "$2" && find . -type f | sed 's|^\./||' | sort) > "$folder/files"
    expected | while read -r file; do
        grep -qx "$file" "$folder/files" || fail "$1 doesn't install $file"
    done
    # What the configuration refers to.
    named=$(grep -o 'usr/share/doc/[^ ]*' "$2/etc/hexz-nbd/hexz-nbd.toml")
    [ -s "$2/$named" ] || fail "$1 doesn't install $named"
    ! grep @ "$2/$named" || fail "$1: $named isn't complete"
    "$2/usr/bin/hexz-nbd" --version > /dev/null || fail "$1: the program"
    ! grep -r "$folder" "$2" || fail "$1 installs the path of the build"
    echo "* $1: $(wc -l < "$folder/files") files"
}

cp packaging/arch/hexz-nbd.* packaging/alpine/hexz-nbd.initd "$folder/src/"
(
    # As makepkg does.
    srcdir=$folder/src pkgdir=$folder/arch CARCH=$(uname -m)
    cd "$srcdir"
    . "$OLDPWD/packaging/arch/PKGBUILD"
    package
)
check PKGBUILD "$folder/arch"
for unit in packaging/systemd/*; do
    cmp "$unit" "$folder/arch/usr/lib/systemd/system/${unit##*/}" || fail "$unit"
done
mkdir -p "$folder/root/etc"
systemd-sysusers --root="$folder/root" - < "$folder/arch/usr/lib/sysusers.d/hexz-nbd.conf" \
    2> /dev/null || fail "sysusers"
grep -q '^hexz-nbd:' "$folder/root/etc/passwd" || fail "sysusers"
systemd-tmpfiles --root="$folder/root" --create - \
    < "$folder/arch/usr/lib/tmpfiles.d/hexz-nbd.conf" || fail "tmpfiles"
[ "$(stat -c %a "$folder/root/var/lib/hexz-nbd")" = 750 ] || fail "tmpfiles"

cp packaging/arch/* "$folder/"
mkdir "$folder/home"
chown -R nobody "$folder"
(cd "$folder" && runuser -u nobody -- env HOME="$folder/home" PACMAN=true makepkg --printsrcinfo) \
    > "$folder/srcinfo"
grep -qx "pkgname = hexz-nbd" "$folder/srcinfo" || fail "makepkg --printsrcinfo"
chown -R root "$folder"

(
    # As abuild does. The user is that of the package.
    srcdir=$folder/src pkgdir=$folder/alpine
    chown() { :; }
    . packaging/alpine/APKBUILD
    cd "$builddir"
    package
)
check APKBUILD "$folder/alpine"
[ -x "$folder/alpine/etc/init.d/hexz-nbd" ] || fail "no OpenRC script"
grep -q 'rc-service hexz-nbd reload' "$folder/alpine/etc/hexz-nbd/hexz-nbd.toml" \
    || fail "the configuration doesn't name the command for a reload"
! grep -r systemctl "$folder/alpine/etc/hexz-nbd" "$folder/alpine/usr/share/doc/hexz-nbd/README" \
    || fail "Alpine has no systemctl"
(
    # As openrc-run does, with a program that rejects the reload.
    ebegin() { :; }
    eend() { return "$1"; }
    . "$folder/alpine/etc/init.d/hexz-nbd"
    printf '#!/bin/sh\necho "$*" > "%s"\nexit 2\n' "$folder/arguments" > "$folder/program"
    chmod +x "$folder/program"
    command=$folder/program
    ! reload || fail "a reload that is rejected looks successful"
    grep -qx "reload $control_socket" "$folder/arguments" || fail "the reload"
    [[ $command_args == *"--control-socket $control_socket" ]] || fail "no control socket"
)
echo "* the OpenRC script reports a failed reload"
