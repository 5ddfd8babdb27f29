# The checks of vm.sh, within the virtual machine: a service of systemd runs them after each boot,
# with the serial console as standard output. The working directory holds the package
# (package.deb), the pages that describe it (README.Debian, *.md), examples, and archives.
#
# Each check prints a line, PASS or FAIL, and a failed one its output. What the pages say is taken
# from them literally. The last line of a run is "checks: PASSED passed, FAILED failed".
set -u
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH LC_ALL=C.UTF-8 SYSTEMD_COLORS=0 SYSTEMD_PAGER=cat DEBIAN_FRONTEND=noninteractive
SHA256=f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c
state=/var/lib/vm-test
mkdir -p $state
out=$state/output before=$state/output-before
touch $out
config=/etc/hexz-nbd/hexz-nbd.toml
drop_in=/etc/systemd/system/hexz-nbd.service.d/test.conf
unit=hexz-nbd.service

topic() {
    printf '* [%s s] %s\n' "$(cut -d. -f1 /proc/uptime)" "$*"
}

# check NAME COMMAND...: the command succeeds.
check() {
    name=$1
    shift
    mv $out $before
    if "$@" > $out 2>&1; then
        echo "PASS $name"
        echo pass >> $state/results
    else
        echo "FAIL $name: exit code $?: $*"
        tail -n 25 $out | sed 's/^/     | /'
        echo fail >> $state/results
    fi
}

# fails CODE COMMAND...: the command fails with this exit code, or with any if it is "any".
fails() {
    expected=$1 code=0
    shift
    "$@" || code=$?
    [ $code != 0 ] && { [ "$expected" = any ] || [ "$expected" = $code ] || {
        echo "exit code $code, not $expected"; false; }; }
}

says() {
    text=$1 said=0
    shift
    "$@" > $state/said 2>&1 || said=$?
    cat $state/said
    grep -q -e "$text" $state/said || { echo "no \"$text\" in that"; return 1; }
    return $said
}

# Prints facts for the reader of the results.
note() {
    sed 's/^/     > /'
}

# Waits until a command succeeds, for a minute at most.
wait_for() {
    tries=0
    until "$@" > $state/waited 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 120 ] || { echo "it never came to: $*"; cat $state/waited; return 1; }
        sleep 0.5
    done
}

# The journal of a unit since the last call of mark.
mark() {
    since=$(date '+%F %T.%6N')
}

journal() {
    journalctl --sync
    journalctl --since "$since" -o cat -u "${1:-$unit}"
}

property() {
    systemctl show -P "$1" "${2:-$unit}"
}

active() {
    [ "$(property ActiveState "$@")" = active ]
}

is_state() {
    echo "$2: $(property ActiveState "$2"), $(property SubState "$2"), $(property Result "$2")"
    [ "$(property ActiveState "$2")" = "$1" ]
}

stop() {
    systemctl stop hexz-nbd.socket hexz-nbd-monitor.socket $unit > $state/stopped 2>&1
    systemctl reset-failed 'hexz-nbd*' > $state/stopped 2>&1
}

# Replaces the drop-in of the unit by standard input.
drop_in() {
    mkdir -p ${drop_in%/*}
    cat > $drop_in
    systemctl daemon-reload
}

no_drop_in() {
    rm -f $drop_in
    systemctl daemon-reload
}

# Replaces the configuration by standard input.
configure() {
    cat > $config
}

common() {
    configure << END
$*
export-dir = "/var/lib/hexz-nbd"
tls-cert = "/etc/hexz-nbd/server-cert.pem"
tls-key = "/etc/hexz-nbd/server-key.pem"
tls-client-ca = "/etc/hexz-nbd/ca-cert.pem"
tls-client-crl = "/etc/hexz-nbd/crl.pem"
audit = "/var/log/hexz-nbd/audit.jsonl"
END
}

local_only() {
    printf '%s\nexport-dir = "/var/lib/hexz-nbd"\n' "$*" | configure
}

tls_uri() {
    echo "nbds://$1/$2?tls-certificates=/root/client"
}

disk_is_right() {
    sum=$(nbdcopy "$1" - | sha256sum | cut -d' ' -f1)
    echo "$sum"
    [ "$sum" = $SHA256 ]
}

# block PAGE TEXT: the indented block of a page that contains the text, without the indentation,
# "sudo", and comments.
block() {
    # Items of a list in README.Debian are indented, too.
    case $1 in
        *README*) indent='        ' ;;
        *) indent='    ' ;;
    esac
    awk -v text="$2" -v indent="$indent" '
        index($0, indent) == 1 { block = block $0 "\n"; next }
        { if (index(block, text)) print block; block = "" }
        END { if (index(block, text)) print block }' "$1" | sed 's/^ *//; s/^sudo //' | sed '/^$/d'
}

# file PAGE PATH: the file that a page shows.
file() {
    awk -v mark="<!-- file: $2 -->" '
        $0 == mark { found = 1; next }
        found && /^```/ { if (inside) exit; inside = 1; next }
        inside { print }' "$1"
}

# The check step of README.Debian, with more options of systemd-run.
readme_check() {
    block README.Debian 'systemd-run --pipe' | sed -n '/^systemd-run/,/--check-config$/p' \
        | sed "s|^systemd-run|systemd-run $*|" > $state/check-step
    cat $state/check-step
    sh -e $state/check-step
}

page_check() {
    block as-a-service.md 'systemd-run --pipe' > $state/check-step
    cat $state/check-step
    sh -e $state/check-step
}

# As a user who is in this group alone.
as_group() {
    member_of=$1
    shift
    setpriv --reuid=nobody --regid="$member_of" --clear-groups "$@"
}

# A client that has selected an export, and then sends what else it is given.
hold() {
    { printf '\0\0\0\1IHAVEOPT\0\0\0\1\0\0\0\15base-zstd.hxz%b' "$1"; sleep 100; } \
        | socat - TCP:127.0.0.1:10809 | sleep 100 &
    client=$!
    wait_for says 'Status: .[1-9]' systemctl status $unit
}

# It has asked for 8 MiB twice, and doesn't read them.
hold_busy() {
    read='\045\0140\0225\023\0\0\0\0\0\0\0\0\0\0\0\01\0\0\0\0\0\0\0\0\0\0200\0\0'
    hold "$read$read"
}

# A client over TLS that doesn't write what it has read.
hold_tls() {
    nbdcopy "$(tls_uri localhost base-zstd.hxz)" - | sleep 100 &
    client=$!
    wait_for says 'Status: .[1-9]' systemctl status $unit
}

readme_check_with() {
    sed -n '/^systemd-run/,/--check-config$/p' $state/check-step \
        | sed "s/-p ${1%%=*}=[a-z-]*/-p $1/" > $state/check-step-with
    cat $state/check-step-with
    sh -e $state/check-step-with
}

check_install() {
    topic "the package is installed as README.Debian says"
    check "dpkg installs it" dpkg -i package.deb
    check "no unit is enabled" fails any systemctl is-enabled hexz-nbd.service hexz-nbd.socket
    check "the service isn't started" fails any systemctl is-active $unit
    install -m 0640 -o root -g hexz-nbd ./*.hxz /var/lib/hexz-nbd/
    hexz-nbd pki --dir /root/pki init > $out 2>&1
    hexz-nbd pki --dir /root/pki server localhost 192.0.2.10 >> $out 2>&1
    hexz-nbd pki --dir /root/pki server nbd.example.org >> $out 2>&1
    hexz-nbd pki --dir /root/pki client backup.example.org >> $out 2>&1
    check "certificates" test -s /root/pki/clients/backup.example.org/client-cert.pem
    cp -r /root/pki/clients/backup.example.org /root/client
    cd /root/pki/servers/localhost || exit
    install -m 0644 server-cert.pem ../../ca-cert.pem ../../crl.pem /etc/hexz-nbd/
    block "$payload/README.Debian" 'install -o root' > $state/install
    note < $state/install
    check "README's installation of the key" sh -e $state/install
    cd "$payload" || exit

    common
    check "README's check step, with audit, before the first start" \
        says 'would serve' readme_check
    check "the check step leaves no file in the log's folder that the service can't use" \
        sh -c '! find /var/log/hexz-nbd ! -user hexz-nbd | grep .'
    mark
    check "systemctl enable --now" systemctl enable --now $unit
    check "it is active" is_state active $unit
    check "the start logs no warning" sh -c \
        "journalctl --sync; ! journalctl -q -u $unit -p warning -o cat | grep ."
    check "nbdinfo over TLS" nbdinfo "$(tls_uri localhost base-zstd.hxz)"
    check "nbdcopy over TLS" disk_is_right "$(tls_uri localhost base-zstd.hxz)"
    mkdir -p /root/nobody && cp /root/client/ca-cert.pem /root/nobody
    check "a client without a certificate is refused" fails any \
        nbdinfo 'nbds://localhost/base-zstd.hxz?tls-certificates=/root/nobody'
    journal | head -n 8 | note
    check "the audit file belongs to the service" \
        says '^hexz-nbd:hexz-nbd 600$' stat -c '%U:%G %a' /var/log/hexz-nbd/audit.jsonl
}

check_watchdog_start() {
    topic "watchdog, from here on"
    # Copies of the unit, with files and folders of their own.
    for copy in long hang; do
        sed "s|/run/hexz-nbd|/run/hexz-nbd-$copy|; s|hexz-nbd.toml |$copy.toml |
            s|^RuntimeDirectory=.*|RuntimeDirectory=hexz-nbd-$copy|" \
            /lib/systemd/system/$unit > /etc/systemd/system/hexz-nbd-$copy.service
        printf 'listen = "unix:/run/hexz-nbd-%s/nbd.sock"\nexport-dir = "/var/lib/hexz-nbd"\n' \
            $copy > /etc/hexz-nbd/$copy.toml
    done
    sed -i 's/^WatchdogSec=.*/WatchdogSec=15/; s/^TimeoutStopSec=.*/TimeoutStopSec=5/' \
        /etc/systemd/system/hexz-nbd-hang.service
    systemctl daemon-reload
    check "two more services start" systemctl start hexz-nbd-long hexz-nbd-hang
    long_pid=$(property MainPID hexz-nbd-long)
    hang_pid=$(property MainPID hexz-nbd-hang)
    long_since=$(cut -d. -f1 /proc/uptime)
    kill -STOP "$hang_pid"
    check "the watchdog is on" says '^2min$' property WatchdogUSec hexz-nbd-long
}

check_reload() {
    topic "reload"
    systemctl start $unit
    pid=$(property MainPID)
    mark
    echo 'allow = ["127.0.0.1", "::1", "192.0.2.0/24"]' >> $config
    check "a reload is accepted" systemctl reload $unit
    check "the log says what changed" says 'reloaded: .*192.0.2.0/24' journal
    cp $config $state/sound
    mark
    echo 'nonsense = 1' >> $config
    check "a reload with an unknown option fails" fails any systemctl reload $unit
    check "the log says why" says config_unknown_option journal
    check "the service continues" active
    check "with the same process" [ "$pid" = "$(property MainPID)" ]
    check "and serves" nbdinfo "$(tls_uri localhost base-zstd.hxz)"
    check "hexz-nbd reload, as root, says why" says config_unknown_option fails 2 hexz-nbd reload
    cp $state/sound $config
    cp /etc/hexz-nbd/server-cert.pem $state/cert
    echo nonsense > /etc/hexz-nbd/server-cert.pem
    check "a reload with a damaged certificate fails" fails any systemctl reload $unit
    check "and serves" nbdinfo "$(tls_uri localhost base-zstd.hxz)"
    cp $state/cert /etc/hexz-nbd/server-cert.pem
    check "a reload is accepted again" systemctl reload $unit
    check "hexz-nbd reload, as root" says '^reloaded' hexz-nbd reload
    check "hexz-nbd reload, as another user, is refused" fails any \
        setpriv --reuid=nobody --regid=nogroup --clear-groups hexz-nbd reload
}

check_logrotate() {
    topic "audit log and logrotate"
    systemctl start $unit
    pid=$(property MainPID)
    file audit.md /etc/logrotate.d/hexz-nbd > $state/logrotate
    check "docs/audit.md has an example" grep -q nocreate $state/logrotate
    for which in docs package; do
        case $which in
            docs) rules=$state/logrotate ;;
            package) rules=/etc/logrotate.d/hexz-nbd ;;
        esac
        rotate() {
            logrotate --state $state/rotated --force --verbose "$rules"
        }
        chmod 0644 "$rules"
        rm -rf $state/rotated
        check "$which: while the service runs" rotate
        check "$which: no error" sh -c "! grep -i '^error' $before"
        check "$which: the new file has owner and mode of the first" wait_for \
            says '^hexz-nbd:hexz-nbd 600$' stat -c '%U:%G %a' /var/log/hexz-nbd/audit.jsonl
        nbdinfo "$(tls_uri localhost base-zstd.hxz)" > $out 2>&1
        check "$which: it has the later events" wait_for \
            grep -q '"reading"' /var/log/hexz-nbd/audit.jsonl
        cp $config $state/sound
        echo 'nonsense = 1' >> $config
        check "$which: once more, which compresses; the reload is rejected" rotate
        check "$which: the program has created a file nevertheless" \
            wait_for test -s /var/log/hexz-nbd/audit.jsonl
        cp $state/sound $config
        check "$which: the service runs" [ "$pid" = "$(property MainPID)" ]
        stop
        check "$which: while the service is stopped" rotate
        check "$which: no error while it is stopped" sh -c "! grep -i '^error' $before"
        check "$which: which doesn't start it" fails any systemctl is-active $unit
        ls -l /var/log/hexz-nbd | note
        systemctl start $unit
        pid=$(property MainPID)
        check "$which: started afterwards, it has owner and mode" wait_for \
            says '^hexz-nbd:hexz-nbd 600$' stat -c '%U:%G %a' /var/log/hexz-nbd/audit.jsonl
        check "$which: others can't read any of the files" \
            sh -c '! find /var/log/hexz-nbd -type f -perm /077 | grep .'
        rm -f /var/log/hexz-nbd/*.jsonl?*
    done
}

check_stop() {
    topic "stop with clients"
    for how in tls idle busy; do
        stop
        case $how in
            tls) common ;;
            *) local_only ;;
        esac
        systemctl start $unit
        case $how in
            tls) check "a client over TLS" hold_tls ;;
            idle) check "an idle client" hold '' ;;
            busy) check "a client that doesn't read" hold_busy ;;
        esac
        sleep 1
        systemctl status $unit | sed -n '/Status:/p' | note
        from=$(date +%s.%N)
        check "$how: systemctl stop" systemctl stop $unit
        echo "$from $(date +%s.%N)" | awk '{ printf "stopped in %.1f s\n", $2 - $1 }' | note
        check "$how: its exit code is 0" says '^0$' property ExecMainStatus
        check "$how: its result is success" says '^success$' property Result
        kill "$client"
    done
}

check_restart() {
    topic "kill and wrong settings"
    local_only
    systemctl start $unit
    kill -KILL "$(property MainPID)"
    check "it is restarted after a kill" wait_for says '^1$' property NRestarts
    check "and becomes active" wait_for active
    stop
    echo 'nonsense = 1' >> $config
    check "a start with an unknown option fails" fails any systemctl start $unit
    check "with exit code 2" says '^2$' property ExecMainStatus
    check "and isn't tried again" says '^0$' property NRestarts
    check "the service has failed" is_state failed $unit
}

check_credentials() {
    topic "credentials"
    mkdir -m 0700 /root/keys
    mv /etc/hexz-nbd/server-key.pem /etc/hexz-nbd/server-cert.pem /root/keys
    chown root:root /root/keys/*
    chmod 0600 /root/keys/*
    printf 'correct horse battery staple' > /root/keys/password
    # The unit's lines, with the key in another folder, since docs show that of /etc as well.
    sed -n 's/^#LoadCredential=/LoadCredential=/p' /lib/systemd/system/$unit \
        | sed 's|/etc/hexz-nbd|/root/keys|; 1i[Service]' > $state/credentials
    note < $state/credentials
    drop_in < $state/credentials
    common
    sed -i '/^tls-cert\|^tls-key/d' $config
    check "README's check step with credentials" says 'over TLS' readme_check \
        "$(sed -n 's/^LoadCredential/-p &/p' $state/credentials | tr '\n' ' ')"
    mark
    check "start" systemctl start $unit
    check "bytes over TLS" disk_is_right "$(tls_uri localhost base-zstd.hxz)"
    check "bytes of an encrypted archive" disk_is_right "$(tls_uri localhost encrypted-zstd.hxz)"
    pid=$(property MainPID)
    echo 'allow = ["127.0.0.1", "::1", "192.0.2.0/24"]' >> $config
    check "a reload is accepted" systemctl reload $unit
    check "the log says what changed" says 'reloaded: .*192.0.2.0/24' journal
    echo 'nonsense = 1' >> $config
    check "a wrong reload fails" fails any systemctl reload $unit
    check "the service continues" active
    check "with the same process" [ "$pid" = "$(property MainPID)" ]
    check "and serves" nbdinfo "$(tls_uri localhost base-zstd.hxz)"
    check "hexz-nbd reload says why" says config_unknown_option fails 2 hexz-nbd reload
    sed -i '$d' $config
    check "hexz-nbd reload" says '^reloaded' hexz-nbd reload
    check "bytes of an encrypted archive after reloads" \
        disk_is_right "$(tls_uri localhost encrypted-zstd.hxz)"
    cp -a /root/keys/server-* /etc/hexz-nbd/
    check "the check step of docs/as-a-service.md with credentials" says 'over TLS' page_check
    chown root:hexz-nbd /etc/hexz-nbd/server-*.pem
    chmod 0640 /etc/hexz-nbd/server-*.pem
}

check_hidden() {
    topic "archives in /home, /tmp and /var/tmp"
    for place in "/home folder" "/home table" "/tmp table" "/var/tmp folder"; do
        folder=${place% *}
        case $folder in
            /home) setting=ProtectHome other=ProtectHome=read-only ;;
            *) setting=PrivateTmp other=PrivateTmp=no ;;
        esac
        mkdir -p $folder/archives
        chmod 755 $folder/archives
        install -m 0644 base-zstd.hxz $folder/archives/web.hxz
        case $place in
            *folder) echo "export-dir = \"$folder/archives\"" ;;
            *table) printf '[exports]\n"web.hxz" = "%s/archives/web.hxz"\n' $folder ;;
        esac | configure
        check "$place: the check step fails and names $setting" \
            says "hides .* change .*$setting" fails 3 readme_check
        grep 'ERROR\|WARN' $out | note
        mark
        check "$place: the start fails" fails any systemctl start $unit
        check "$place: and names $setting" says "hides .* change .*$setting" journal
        stop
        printf '[Service]\n%s\n' $other | drop_in
        check "$place: the check step succeeds with $other" \
            says 'would serve' readme_check_with $other
        check "$place: the start with $other" systemctl start $unit
        check "$place: bytes" disk_is_right nbd://127.0.0.1/web.hxz
        stop
        no_drop_in
    done
}

check_group() {
    topic "Unix sockets and their group"
    local_only 'listen = "unix:/run/hexz-nbd/nbd.sock"
socket-group = "hexz-nbd"
socket-mode = "0660"'
    socket=/run/hexz-nbd/nbd.sock
    check "the group of the service" systemctl start $unit
    check "the socket has it" says '^hexz-nbd:hexz-nbd 660$' stat -c '%U:%G %a' $socket
    check "a member of the group connects" \
        as_group hexz-nbd nbdinfo "nbd+unix:///base-zstd.hxz?socket=$socket"
    check "others don't" fails any \
        as_group disk nbdinfo "nbd+unix:///base-zstd.hxz?socket=$socket"
    stop
    sed -i 's/^socket-group.*/socket-group = "disk"/' $config
    mark
    check "another group: the start fails" fails any systemctl start $unit
    check "another group: the log names what the unit needs" \
        says 'SystemCallFilter=fchownat' journal
    stop
    printf '[Service]\nSupplementaryGroups=disk\nSystemCallFilter=fchownat\n' | drop_in
    mark
    check "another group: the start fails with PrivateUsers=yes" fails any systemctl start $unit
    check "another group: the log names that, too" says 'PrivateUsers=no' journal
    stop
    grep 'socket-group. with another' as-a-service.md | tr '`' '\n' | sed -n 's/GROUP/disk/; /=/p' \
        | sed 1i'[Service]' > $state/group
    note < $state/group
    drop_in < $state/group
    check "another group, as documented" systemctl start $unit
    check "the socket has it" says '^hexz-nbd:disk 660$' stat -c '%U:%G %a' $socket
    check "a member of the group connects" \
        as_group disk nbdinfo "nbd+unix:///base-zstd.hxz?socket=$socket"
    stop
    no_drop_in
}

check_vsock() {
    topic "vsock"
    local_only 'listen = "vsock:10809"
allow = ["vsock"]'
    mark
    check "it can't be bound under the unit" fails any systemctl start $unit
    check "the log says what the unit lacks" says 'RestrictAddressFamilies= needs AF_VSOCK' journal
    stop
    printf '[Service]\n%s\n' "$(sed -n 's/^| `listen = "vsock:10809"` | `\([^`]*\)`.*/\1/p' \
        as-a-service.md)" | drop_in
    note < $drop_in
    check "it can as documented" systemctl start $unit
    modprobe vsock_loopback
    check "a client connects by vsock" nbdinfo nbd+vsock://1/base-zstd.hxz
    stop
    no_drop_in
}

check_monitor() {
    topic "monitor"
    local_only 'monitor = "unix:/run/hexz-nbd/monitor.sock"'
    check "on a Unix socket" systemctl start $unit
    where=unix:/run/hexz-nbd/monitor.sock
    check "only the service's user and root can connect" \
        says '^hexz-nbd:hexz-nbd 700$' stat -c '%U:%G %a' ${where#unix:}
    check "hexz-nbd health, as root" says '^ok' hexz-nbd health --monitor $where
    check "hexz-nbd health --ready, as root" hexz-nbd health --ready --monitor $where
    check "hexz-nbd top, as root" hexz-nbd top --once $where
    check "others can't" fails any as_group hexz-nbd hexz-nbd health --monitor $where
    note < $out
    stop
    local_only
    group=/etc/systemd/system/hexz-nbd-monitor.socket.d/group.conf
    mkdir -p ${group%/*}
    { echo '[Socket]'
        grep -o '`\(ListenStream\|SocketGroup\)=[^`]*`' as-a-service.md | tr -d '`'; } > $group
    note < $group
    systemctl daemon-reload
    check "hexz-nbd-monitor.socket on a Unix socket with a group, as documented" \
        systemctl start hexz-nbd.socket hexz-nbd-monitor.socket
    check "its socket has group and mode" says '^root:adm 660$' \
        stat -c '%U:%G %a' /run/hexz-nbd-monitor.sock
    where=unix:/run/hexz-nbd-monitor.sock
    check "hexz-nbd health as a member" says '^ok' as_group adm hexz-nbd health --monitor $where
    check "hexz-nbd top as a member" as_group adm hexz-nbd top --once $where
    check "not as another" fails any as_group games hexz-nbd health --monitor $where
    stop
    rm -r /etc/systemd/system/hexz-nbd-monitor.socket.d
    systemctl daemon-reload
}

check_sockets() {
    topic "sockets of systemd"
    local_only
    systemctl start $unit
    mark
    check "the socket can't be started while the service runs" \
        fails any systemctl start hexz-nbd.socket
    note < $out
    check "the journal says why" says 'already active, refusing' journal hexz-nbd.socket
    check "the service continues" nbdinfo nbd://127.0.0.1/base-zstd.hxz
    check "as the page says: disable the service, enable the socket" \
        sh -ec "$(block as-a-service.md 'disable --now')"
    check "the socket is active" is_state active hexz-nbd.socket
    check "the service isn't" is_state inactive $unit
    check "the first client starts it" disk_is_right nbd://127.0.0.1/base-zstd.hxz
    check "the service is active" is_state active $unit
    check "reload, socket-activated" systemctl reload $unit
    check "restart while the socket listens" systemctl restart $unit
    check "bytes after the restart, by IPv6" disk_is_right 'nbd://[::1]/base-zstd.hxz'
    systemctl stop $unit 2> $out
    echo 'nonsense = 1' >> $config
    # Five starts within ten seconds are too many; this machine may be too slow for that.
    printf '[Unit]\nStartLimitIntervalSec=5min\n' | drop_in
    mark
    tries=0
    while active hexz-nbd.socket && [ $tries -lt 60 ]; do
        tries=$((tries + 1))
        timeout 5 nbdinfo nbd://127.0.0.1/base-zstd.hxz > $out 2>&1
    done
    echo "after $tries connections" | note
    is_state any $unit | note
    is_state any hexz-nbd.socket | note
    journal hexz-nbd.socket | note
    check "with a failing start, the socket fails as documented" \
        sh -c 'systemctl show -P Result hexz-nbd.service hexz-nbd.socket | grep -q start-limit-hit'
    check "neither of them is active" fails any systemctl is-active hexz-nbd.socket $unit
    local_only
    check "the documented recovery" sh -ec "$(block README.Debian 'reset-failed')"
    check "that of the page is the same" [ "$(block README.Debian 'reset-failed' \
        | grep systemctl | grep -v enable)" = "$(block as-a-service.md 'reset-failed')" ]
    check "the socket is active again" is_state active hexz-nbd.socket
    check "bytes after the recovery" disk_is_right nbd://127.0.0.1/base-zstd.hxz
    systemctl disable hexz-nbd.socket 2> $out
    stop
    no_drop_in
}

check_accept() {
    topic "a service with Accept=yes"
    mkdir -p /srv/snapshots
    install -m 0644 base-zstd.hxz /srv/snapshots/db.hexz
    file as-a-service.md /etc/systemd/system/nbd@.service > $state/nbd
    cp $state/nbd /etc/systemd/system/nbd@.service
    printf '[Socket]\nListenStream=127.0.0.1:10819\nAccept=yes\n' > /etc/systemd/system/nbd.socket
    systemctl daemon-reload
    check "its socket" systemctl start nbd.socket
    mark
    check "its bytes" disk_is_right nbd://127.0.0.1:10819
    check "it logs to the journal" says 'client\|connect\|serving' journal 'nbd@*'
    journal 'nbd@*' | grep -v systemd | head -n 8 | note
    rm /srv/snapshots/db.hexz
    mark
    nbdinfo nbd://127.0.0.1:10819 > $out 2>&1
    check "it logs a missing archive to the journal" says "db.hexz.*can't open" journal 'nbd@*'
    journal 'nbd@*' | grep db.hexz | head -n 2 | note
    systemctl stop nbd.socket
}

check_analyze() {
    topic "exposure, and what systemd-analyze says"
    systemd-analyze security $unit > $state/security 2>&1
    tail -n 1 $state/security | note
    check "the exposure is that of the page" grep -q "exposure level.* $(sed -n \
        's/.*rates its exposure \([0-9.]*[0-9]\) of 10.*/\1/p' as-a-service.md) " $state/security
    check "the package's units" systemd-analyze verify --man=no /lib/systemd/system/hexz-nbd*
    adduser --quiet --system --group hexz-ca
    cp hexz-nbd-renew.* /etc/systemd/system
    systemctl daemon-reload
    check "the units of examples/" \
        systemd-analyze verify --man=no /etc/systemd/system/hexz-nbd-renew.*
    mkdir -p /etc/systemd/system/hexz-nbd-renew.service.d
    # There is no second machine.
    sed -n '/^ExecStart=.usr.bin.hexz-nbd /p' hexz-nbd-renew.service \
        | sed '1i[Service]\nExecStart=' > /etc/systemd/system/hexz-nbd-renew.service.d/test.conf
    mkdir -p /var/lib/hexz-ca
    cp -r /root/pki /var/lib/hexz-ca
    chown -R hexz-ca:hexz-ca /var/lib/hexz-ca
    check "the timer is started as the page says" \
        sh -ec "$(block certificate-renewal.md 'hexz-nbd-renew.timer' | grep systemctl)"
    systemctl list-timers hexz-nbd-renew.timer | note
    mark
    check "the renewal, without the copy" systemctl start hexz-nbd-renew.service
    journal hexz-nbd-renew.service | note
}

check_upgrade() {
    topic "upgrade"
    systemctl enable --now $unit 2> $out
    pid=$(property MainPID)
    cp $config $state/sound
    check "it is installed once more" dpkg -i package.deb
    check "the configuration stays" cmp $state/sound $config
    check "the service was restarted" fails any [ "$pid" = "$(property MainPID)" ]
    check "and is active" is_state active $unit
    echo 'nonsense = 1' >> $config
    check "an upgrade to what refuses the configuration says so" \
        says 'does not start any more' dpkg -i package.deb
    check "and succeeds" says '^ii' dpkg-query -W -f '${db:Status-Abbrev}' hexz-nbd
    check "is-failed, as README.Debian says" systemctl is-failed $unit
    cp $state/sound $config
    systemctl start $unit
}

check_watchdog() {
    [ -n "${long_pid-}" ] || check_watchdog_start
    topic "watchdog"
    while [ $(($(cut -d. -f1 /proc/uptime) - long_since)) -lt 185 ]; do
        sleep 1
    done
    echo "after $(($(cut -d. -f1 /proc/uptime) - long_since)) s" | note
    check "no kill in three minutes" [ "$long_pid" = "$(property MainPID hexz-nbd-long)" ]
    check "a process that hangs is killed" fails any kill -0 "$hang_pid"
    check "and the journal says why" sh -c 'journalctl -o cat -u hexz-nbd-hang | grep -i watchdog'
    check "and restarted" wait_for active hexz-nbd-hang
    systemctl stop hexz-nbd-long hexz-nbd-hang
    rm /etc/systemd/system/hexz-nbd-long.service /etc/systemd/system/hexz-nbd-hang.service \
        /etc/hexz-nbd/long.toml /etc/hexz-nbd/hang.toml
    systemctl daemon-reload
}

check_purge() {
    topic "purge, and another group"
    systemctl start $unit
    gid=$(getent group hexz-nbd | cut -d: -f3)
    check "purge while it runs" dpkg -P hexz-nbd
    check "the service is gone" fails any systemctl is-active $unit
    check "no link to it is left" sh -c \
        '! find /etc/systemd -type l -name "hexz-nbd*" ! -name "*renew*" | grep .'
    check "the audit is gone" [ ! -e /var/log/hexz-nbd ]
    check "snapshots stay" test -s /var/lib/hexz-nbd/base-zstd.hxz
    check "the key stays" test -s /etc/hexz-nbd/server-key.pem
    addgroup --quiet --system other
    adduser --quiet --system --ingroup other --no-create-home other
    echo "hexz-nbd was $gid; $(getent group other)" | note
    check "no file belongs to the new group" sh -c \
        '! find / -xdev \( -group other -o -user other \) | grep .'
    check "the new user can't read the key" fails any \
        setpriv --reuid=other --regid=other --init-groups cat /etc/hexz-nbd/server-key.pem
    check "nor a snapshot" fails any \
        setpriv --reuid=other --regid=other --init-groups cat /var/lib/hexz-nbd/base-zstd.hxz
    check "it is installed again" dpkg -i package.deb
    common
    check "and starts" systemctl enable --now $unit
    check "bytes over TLS" disk_is_right "$(tls_uri localhost base-zstd.hxz)"
    stop
    check "it is purged" dpkg -P hexz-nbd
    rm -r /etc/hexz-nbd /var/lib/hexz-nbd
    check "README's deletion of the user" sh -ec "$(block README.Debian 'deluser')"
    check "the group is gone, too" fails any getent group hexz-nbd
    addgroup --quiet --system third
    check "it is installed once more" dpkg -i package.deb
}

check_later_address() {
    topic "sockets of an address that appears later: boot"
    install -m 0640 -o root -g hexz-nbd ./*.hxz /var/lib/hexz-nbd/
    install -m 0644 /root/pki/servers/localhost/server-cert.pem /root/pki/ca-cert.pem \
        /root/pki/crl.pem /etc/hexz-nbd/
    install -o root -g hexz-nbd -m 0640 /root/pki/servers/localhost/server-key.pem /etc/hexz-nbd/
    common 'allow = "192.0.2.0/24"'
    mkdir -p /etc/systemd/system/hexz-nbd.socket.d
    printf '[Socket]\nListenStream=\nListenStream=192.0.2.10:10809\n' \
        > /etc/systemd/system/hexz-nbd.socket.d/test.conf
    systemctl daemon-reload
    check "the socket is enabled" systemctl enable hexz-nbd.socket
    sync
    touch $state/second
    systemctl reboot
    sleep 120
}

second_boot() {
    topic "sockets of an address that appears later: after the boot"
    check "the machine hasn't the address" fails any sh -c 'ip -o address | grep 192.0.2.10'
    check "the socket is active" is_state active hexz-nbd.socket
    check "the service isn't started" is_state inactive $unit
    ip link set lo up
    ip address add 192.0.2.10/32 dev lo
    check "bytes over TLS at the new address" disk_is_right "$(tls_uri 192.0.2.10 base-zstd.hxz)"
    check "the service is active" is_state active $unit
    check "no unit of hexz-nbd has failed" \
        sh -c '! systemctl --failed --plain --no-legend | grep hexz'
}

payload=$PWD
topics=$(cat topics)
[ -n "$topics" ] || topics='watchdog_start reload logrotate stop restart credentials hidden group
    vsock monitor sockets accept analyze upgrade watchdog purge later_address'
finish() {
    echo "checks: $(grep -c pass $state/results) passed, $(grep -c fail $state/results) failed"
    sync
    systemctl --force poweroff
    sleep 120
}

if [ -e $state/second ]; then
    second_boot
    finish
fi
check_install
for topic in $topics; do
    stop
    no_drop_in
    common
    check_$topic
done
finish
