//! Advice on reaching the server: name resolution, the connection, and the greeting.

use std::io::ErrorKind;
use std::time::Duration;

use nbd_server::wire::handshake::HandshakeFlags;

use super::{Client, Network, Server};
use crate::commands::doctor::connect::{Address, ConnectFailure, FailedAttempt};
use crate::commands::doctor::greeting::{ForeignProtocol, ServerGreeting};
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut, format_duration};

pub(crate) fn unresolved(host: &str, error: &str) -> Step {
    let host = escape_and_cut(host);
    Step::bad("name", format!("{host} has no address: {}", escape_and_cut(error)))
        .advise(Client, format!("is {host} spelled as it should be? Try its IP address"))
        .advise(Network, "see that this machine's name service knows it: getent hosts NAME")
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
    step.at_least(Outcome::Warning).detail("failed", lines).advise(
        Server,
        "it doesn't listen on all addresses of its name; clients that don't try others wait or \
         fail. Let it listen there, too, or take these addresses out of DNS",
    )
}

pub(crate) fn unconnected(failed: &[FailedAttempt]) -> Step {
    let step = Step::bad("connection", "there is none").detail("failed", attempts(failed));
    let step = attempts(failed).into_iter().fold(step, Step::line);
    let has = |what: ConnectFailure| failed.iter().any(|(_, unreached, _)| *unreached == what);
    let mut step = step;
    if has(ConnectFailure::Io(ErrorKind::ConnectionRefused)) {
        let is_unix = failed.iter().any(|(address, ..)| matches!(address, Address::Unix(_)));
        step = if is_unix {
            step.advise(Server, "the socket is there, and nobody listens on it: start the server")
        } else {
            step.advise(
                Server,
                "nothing listens on that port of that address: is the server running, on this \
                 port, and not on loopback alone? (ss -ltn on the server says so; hexz-nbd and \
                 others have --listen or --ipaddr, -b)",
            )
            .advise(Network, "or a firewall rejects the connection")
        };
    }
    if has(ConnectFailure::Timeout) || has(ConnectFailure::Io(ErrorKind::TimedOut)) {
        step = step
            .advise(
                Network,
                "packets are dropped: a firewall on the way or on the server lets this port not \
                 through, or the address is that of no machine",
            )
            .advise(Server, "let the port through in its firewall, for the addresses of clients");
    }
    if has(ConnectFailure::Io(ErrorKind::HostUnreachable))
        || has(ConnectFailure::Io(ErrorKind::NetworkUnreachable))
    {
        step = step.advise(Network, "there is no route to it: is it in another network or VPN?");
    }
    if has(ConnectFailure::Io(ErrorKind::NotFound)) {
        step = step.advise(
            Client,
            "there is no such socket: is the path right, and does the server run (in this file \
             system, not in that of a container)?",
        );
    }
    if has(ConnectFailure::Io(ErrorKind::ConnectionReset))
        || has(ConnectFailure::Io(ErrorKind::ConnectionAborted))
    {
        step = dropped_before_greeting(step);
    }
    if has(ConnectFailure::Io(ErrorKind::PermissionDenied)) {
        step = step.advise(
            Server,
            "this user may not connect to the socket: it takes the right to write to it, and to \
             enter all folders above it",
        );
    }
    step
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
            step.at_least(Outcome::Bad).advise(
                Server,
                "it is so old that it has neither TLS nor a way to say what is wrong: take a newer \
                 one (nbd-server since 3.3, nbdkit, qemu-nbd)",
            )
        }
        ServerGreeting::Oldstyle => {
            Step::bad(NAME, "NBD, oldstyle").detail("style", "oldstyle").advise(
                Server,
                "it speaks the dialect of before 2011, which has no names and no TLS, and which \
                 most clients have given up: take a newer server, or switch the new dialect on \
                 (nbdkit: without -o; qemu-nbd: with -x NAME)",
            )
        }
        ServerGreeting::Partial(length) => Step::bad(
            NAME,
            format!("it ends after {length} bytes of NBD's greeting"),
        )
        .advise(Server, "it broke down in the middle of its first words; its log may say why"),
        ServerGreeting::Closed => dropped_before_greeting(Step::bad(
            NAME,
            "the connection is closed before a word is said",
        )),
        ServerGreeting::Silence => {
            let waited = format_duration(timeout);
            Step::bad(NAME, format!("nothing was said in {waited}"))
                .advise(
                    Server,
                    "an NBD server speaks first: this is another service, or one that hangs, or one \
                     that is busy with another client (qemu-nbd serves one at a time unless --shared \
                     says more)",
                )
                .advise(
                    Server,
                    "or it waits for a load balancer's PROXY header and takes this machine for one",
                )
                .advise(Client, "is it the right port? NBD's is 10809")
        }
        ServerGreeting::Foreign(protocol) => foreign(NAME, protocol),
    }
}

/// Adds advice for a server that closes or resets the connection before it sends anything.
fn dropped_before_greeting(step: Step) -> Step {
    step.advise(
        Server,
        "that is how servers turn away addresses that they don't let in: look for this machine's \
         address in hexz-nbd's --allow, --deny and --rules, in nbd-server's authfile, in \
         /etc/hosts.allow and hosts.deny",
    )
    .advise(
        Server,
        "or it has as many clients as it takes (qemu-nbd: --shared, nbd-server: max_connections, \
         hexz-nbd: --max-connections), or it can't open what it serves; its log says which",
    )
    .advise(Network, "or a proxy or port forwarding in between reaches no server behind it")
}

fn foreign(name: &'static str, protocol: &ForeignProtocol) -> Step {
    let (what, key) = match protocol {
        ForeignProtocol::Ssh => ("this is SSH", "ssh"),
        ForeignProtocol::Http => ("this seems to be a web server (HTTP)", "http"),
        ForeignProtocol::Tls => {
            ("this seems to be TLS from the first byte (HTTPS, or a stunnel)", "tls")
        }
        ForeignProtocol::Mail => ("this seems to be a mail or FTP server", "mail"),
        ForeignProtocol::Vnc => ("this is VNC", "vnc"),
        ForeignProtocol::Unknown(_) => ("this is something else than NBD", "unknown"),
    };
    let mut step = Step::bad(name, what).detail("protocol", key);
    if let ForeignProtocol::Unknown(bytes) = protocol {
        step = step.line(format!(
            "it begins with \"{}\"",
            escape_and_cut(&bytes.escape_ascii().to_string())
        ));
    }
    match protocol {
        ForeignProtocol::Tls => step.advise(
            Server,
            "NBD begins in clear and goes over to TLS by STARTTLS: take the TLS wrapper away and \
             let the server do TLS, or connect through the other end of the wrapper",
        ),
        _ => step.advise(Client, "it is another port, or another machine: NBD's port is 10809"),
    }
}
