#!/bin/sh
# Makes a small CA and a server certificate, for trying things out or for a few machines
# of your own.
#
#   certs/make-certs.sh FOLDER NAME [NAME ...]
#
# NAME is each DNS name or address by which clients will call the server. The folder then
# holds
#
#   ca-cert.pem      give it to every client
#   server-cert.pem  --tls-cert
#   server-key.pem   --tls-key
#   ca-key.pem       signs further certificates: move it to where nobody else gets at it
#
# An existing CA in the folder is used again; an existing server key is not overwritten.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
folder=$1
shift
command -v openssl > /dev/null || {
    echo "this script needs the program openssl" >&2
    exit 1
}
mkdir -p "$folder"
cd "$folder"
umask 077

# Says what openssl says only if it fails; it is talkative.
quietly() {
    "$@" 2> "$said" || {
        cat "$said" >&2
        exit 1
    }
}
said=$(mktemp)
request=$(mktemp)
trap 'rm -f "$said" "$request" "$request.ext" "$request.key"' EXIT

if [ -e server-key.pem ]; then
    echo "$folder/server-key.pem is there already; remove it first for a new one" >&2
    exit 1
fi
if [ -e ca-cert.pem ] && [ ! -e ca-key.pem ]; then
    echo "$folder/ca-cert.pem is there without its key: put ca-key.pem back to sign with it" >&2
    exit 1
fi
if [ -e ca-key.pem ] && [ ! -e ca-cert.pem ]; then
    echo "$folder/ca-key.pem is there without its certificate: put ca-cert.pem back" >&2
    exit 1
fi
if [ ! -e ca-key.pem ]; then
    quietly openssl req -x509 -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -keyout ca-key.pem -out ca-cert.pem -days 3650 -subj '/CN=hexz-nbd CA' \
        -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' \
        -addext 'keyUsage=critical,keyCertSign,cRLSign'
fi

names=
for name in "$@"; do
    case $name in
    *:* | *[0-9].[0-9]*.[0-9]*.[0-9]*) kind=IP ;;
    *) kind=DNS ;;
    esac
    names="$names${names:+,}$kind:$name"
done
cat > "$request.ext" <<EXTENSIONS
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth
subjectAltName=$names
EXTENSIONS
quietly openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
    -keyout "$request.key" -out "$request" -subj "/CN=$1"
quietly openssl x509 -req -in "$request" -CA ca-cert.pem -CAkey ca-key.pem \
    -set_serial "0x$(openssl rand -hex 16)" -days 397 -extfile "$request.ext" \
    -out server-cert.pem
# The key comes last: without it another try starts anew.
cp "$request.key" server-key.pem
chmod 644 ca-cert.pem server-cert.pem

echo "made $folder/server-cert.pem for $names; clients need $folder/ca-cert.pem"
