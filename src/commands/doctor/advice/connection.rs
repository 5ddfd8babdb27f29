//! Advice on reaching the server: name resolution, the connection, and the greeting.

use std::io::ErrorKind;
use std::time::Duration;

use nbd_server::wire::handshake::HandshakeFlags;

use super::{Client, Network, Server};
use crate::commands::doctor::connect::{Address, ConnectFailure, FailedAttempt};
use crate::commands::doctor::greeting::{ForeignProtocol, ServerGreeting};
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};
use crate::commands::output::format_seconds;

pub(crate) fn unresolved(host: &str, error: &str) -> Step {
    let host = escape_and_cut(host);
    Step::bad("name", "unresolved", format!("can't resolve {host}: {}", escape_and_cut(error)))
        .advise(Client, format!("check the spelling of {host}, or use its IP address"))
        .advise(Network, "check this machine's name service: getent hosts NAME")
}

fn attempts(failed: &[FailedAttempt]) -> Vec<String> {
    failed.iter().map(|(address, _, error)| format!("{address}: {error}")).collect()
}

pub(crate) fn connected(address: &Address, failed: &[FailedAttempt]) -> Step {
    let step =
        Step::good("connection", format!("to {address}")).detail("address", address.to_string());
    if failed.is_empty() {
        return step;
    }
    let lines = attempts(failed);
    let step = lines.iter().fold(step, |step, line| step.line(line.clone()));
    step.problem(Outcome::Warning, "some_addresses_failed").detail("failed", lines).advise(
        Server,
        "it doesn't listen on all addresses of its name, so clients that try only one of them \
         wait or fail: make it listen on them, or remove them from DNS",
    )
}

pub(crate) fn unconnected(failed: &[FailedAttempt]) -> Step {
    let lines = attempts(failed);
    let step = Step::good("connection", "can't connect").detail("failed", lines.clone());
    let mut step = lines.into_iter().fold(step, Step::line);
    let has = |kinds: &[ErrorKind]| {
        failed.iter().any(|(_, failure, _)| match failure {
            ConnectFailure::Io(kind) => kinds.contains(kind),
            ConnectFailure::Timeout => kinds.contains(&ErrorKind::TimedOut),
        })
    };
    let bad = Outcome::Bad;
    if has(&[ErrorKind::ConnectionRefused]) {
        let is_unix = failed.iter().any(|(address, ..)| matches!(address, Address::Unix(_)));
        step = step.problem(bad, "connection_refused");
        step = if is_unix {
            step.advise(Server, "the socket exists, but nothing listens on it: start the server")
        } else {
            step.advise(
                Server,
                "nothing listens on this port of this address: start the server, and check its \
                 port, and that it doesn't listen on loopback only (ss -ltn; hexz-nbd --listen, \
                 nbdkit --ipaddr, qemu-nbd -b)",
            )
            .advise(Network, "or a firewall rejects the connection")
        };
    }
    if has(&[ErrorKind::TimedOut]) {
        step = step
            .problem(bad, "connection_timeout")
            .advise(
                Network,
                "packets are dropped: a firewall on the path or on the server blocks the port, or \
                 no machine has this address",
            )
            .advise(Server, "open the port in its firewall for the addresses of its clients");
    }
    if has(&[ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable]) {
        step = step.problem(bad, "no_route").advise(
            Network,
            "there is no route to it: check whether it needs another network or VPN",
        );
    }
    if has(&[ErrorKind::NotFound]) {
        step = step.problem(bad, "no_socket").advise(
            Client,
            "the socket doesn't exist: check the path, and whether the server is running (in this \
             file system, not in that of a container)",
        );
    }
    if has(&[ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted]) {
        step = dropped_before_greeting(step.problem(bad, "connection_reset"));
    }
    if has(&[ErrorKind::PermissionDenied]) {
        step = step.problem(bad, "permission_denied").advise(
            Server,
            "this user may not connect to the socket: that takes write permission on the socket, \
             and search permission on all folders above it",
        );
    }
    if step.reasons.is_empty() { step.problem(bad, "unreachable") } else { step }
}

pub(crate) fn greeting(observed: &ServerGreeting, timeout: Duration) -> Step {
    const NAME: &str = "greeting";
    match observed {
        ServerGreeting::Newstyle(greeting) => {
            let is_fixed = greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
            let style = if is_fixed { "fixed newstyle" } else { "newstyle, not fixed" };
            let step = Step::good(NAME, format!("NBD, {style}")).detail("style", style);
            if is_fixed {
                return step;
            }
            step.problem(Outcome::Bad, "not_fixed_newstyle").advise(
                Server,
                "it is too old to support TLS or to report errors: use a newer one (nbd-server \
                 3.3 or later, nbdkit, qemu-nbd)",
            )
        }
        ServerGreeting::Oldstyle => {
            Step::bad(NAME, "oldstyle", "NBD, oldstyle").detail("style", "oldstyle").advise(
                Server,
                "it uses the protocol from before 2011, which has neither export names nor TLS, \
                 and which most clients no longer support: use a newer server, or enable newstyle \
                 (nbdkit: without -o; qemu-nbd: with -x NAME)",
            )
        }
        ServerGreeting::Partial(length) => {
            Step::bad(NAME, "partial_greeting", format!("NBD, but it ends after {length} bytes"))
                .advise(Server, "it failed while it sent the greeting; check its log")
        }
        ServerGreeting::Closed => dropped_before_greeting(Step::bad(
            NAME,
            "closed_before_greeting",
            "the connection was closed before the greeting",
        )),
        ServerGreeting::Silence => {
            let waited = format_seconds(timeout.as_secs_f64());
            Step::bad(NAME, "no_greeting", format!("no data within {waited}"))
                .advise(
                    Server,
                    "an NBD server sends first: this is another service, or it hangs, or it is \
                     busy with another client (qemu-nbd serves one at a time without --shared)",
                )
                .advise(
                    Server,
                    "or it waits for a PROXY header, because it takes this machine for a load \
                     balancer",
                )
                .advise(Client, "check the port; NBD's is 10809")
        }
        ServerGreeting::Foreign(protocol) => foreign(NAME, protocol),
    }
}

/// Adds advice for a server that closes or resets the connection before it sends anything.
fn dropped_before_greeting(step: Step) -> Step {
    step.advise(
        Server,
        "servers do that to addresses that they don't admit: look for this machine's address in \
         hexz-nbd's --allow, --deny and --rules, in nbd-server's authfile, and in \
         /etc/hosts.allow and hosts.deny",
    )
    .advise(
        Server,
        "or it has reached its limit of clients (qemu-nbd: --shared, nbd-server: max_connections, \
         hexz-nbd: --max-connections), or can't open what it serves; check its log",
    )
    .advise(Network, "or a proxy or port forwarding on the path reaches no server")
}

fn foreign(name: &'static str, protocol: &ForeignProtocol) -> Step {
    let (what, key) = match protocol {
        ForeignProtocol::Ssh => ("SSH, not NBD", "ssh"),
        ForeignProtocol::Http => {
            ("HTTP, not NBD: it sends nothing until it gets a request", "http")
        }
        ForeignProtocol::Tls => ("TLS from the first byte (HTTPS or stunnel), not NBD", "tls"),
        ForeignProtocol::Mail => ("a mail or FTP server, not NBD", "mail"),
        ForeignProtocol::Vnc => ("VNC, not NBD", "vnc"),
        ForeignProtocol::Unknown(_) => ("an unknown protocol, not NBD", "unknown"),
    };
    let mut step = Step::bad(name, "other_protocol", what).detail("protocol", key);
    if let ForeignProtocol::Unknown(bytes) = protocol {
        let text = escape_and_cut(&bytes.escape_ascii().to_string());
        step = step.line(format!("first bytes: \"{text}\""));
    }
    match protocol {
        ForeignProtocol::Tls => step
            .advise(Client, "check host and port: HTTPS servers do that; NBD's port is 10809")
            .advise(
                Server,
                "or a TLS wrapper is in front of it: NBD starts in plaintext and switches to TLS \
                 with STARTTLS, so remove the wrapper and let the server do TLS, or connect \
                 through the other end of the wrapper",
            ),
        _ => step.advise(Client, "check host and port; NBD's port is 10809"),
    }
}
