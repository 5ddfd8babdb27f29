# Two client machines and a server, in network namespaces of their own. The caller gives
# BINARY and ARCHIVE, and runs this in new user, network and mount namespaces.
set -eu
mount -t tmpfs tmpfs /run
mkdir /run/netns
ip link set lo up
for number in 1 2; do
    ip netns add "client$number"
    ip link add "server$number" type veth peer name eth0 netns "client$number"
    ip addr add "10.1.$number.1/24" dev "server$number"
    ip link set "server$number" up
    ip -n "client$number" addr add "10.1.$number.2/24" dev eth0
    ip -n "client$number" link set eth0 up
done

"$BINARY" pki --dir /run/pki init > /dev/null
"$BINARY" pki --dir /run/pki server 10.1.1.1 10.1.2.1 > /dev/null
PKI=/run/pki/servers/10.1.1.1
"$BINARY" --log-format json --tls-cert "$PKI/server-cert.pem" --tls-key "$PKI/server-key.pem" \
    --allow 10.1.1.0/24 "$ARCHIVE" 2> /run/log &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
tries=0
until grep -q '"ready' /run/log; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { cat /run/log; exit 1; }
    sleep 0.1
done

try() {
    ip netns exec "client$1" timeout 20 \
        nbdinfo --size "nbds://10.1.$1.1/?tls-certificates=$PKI" 2>&1 || echo refused
}
echo "allowed: $(try 1)"
echo "stranger: $(try 2 | tail -n 1)"
# The bytes that a stranger gets before the end.
echo "bytes: $(ip netns exec client2 timeout 20 bash -c 'cat < /dev/tcp/10.1.2.1/10809' 2> /dev/null | wc -c)"
echo "refused in the log: $(grep '"peer":"10.1.2.2"' /run/log | grep -c '"cause":"no_rule_for_address"')"
kill $server
wait $server
echo "ended: $?"
