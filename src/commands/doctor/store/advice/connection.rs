//! Advice on reaching the store: the connection, a proxy, and the TLS handshake.

use object_reader::{StoreError, StoreErrorKind, TlsFailure};

use super::{Client, Network, Server};
use crate::commands::doctor::advice::unconnected as unconnected_to_server;
use crate::commands::doctor::connect::FailedAttempt;
use crate::commands::doctor::report::{Advice, Step, escape_and_cut};

/// Builds the step for a server, or a proxy, that can't be connected to.
pub(crate) fn unconnected(failed: &[FailedAttempt], is_proxy: bool) -> Step {
    let mut step = unconnected_to_server(failed);
    // Those are about NBD servers.
    step.advice.retain(|it| !matches!(it.reason, "connection_refused" | "connection_reset"));
    let (what, options) = match is_proxy {
        true => ("the proxy", "--store-proxy, HTTPS_PROXY, HTTP_PROXY"),
        false => ("the store", "the URL, --store-endpoint"),
    };
    if let Some(&reason) = step.reasons.iter().find(|it| it.starts_with("connection_re")) {
        step.advice.push(Advice {
            side: Client,
            reason,
            text: format!("check host and port of {what}: {options}"),
        });
        let text = format!("nothing accepts connections on this port: start {what}");
        step.advice.push(Advice { side: Server, reason, text });
    } else if !is_proxy && let Some(&reason) = step.reasons.first() {
        let text = "if this network requires a proxy, name it with --store-proxy".to_owned();
        step.advice.push(Advice { side: Client, reason, text });
    }
    step
}

pub(crate) fn tunnel_failed(error: &StoreError) -> Step {
    let step = Step::bad("proxy", "proxy_refused", escape_and_cut(&error.message));
    match error.kind {
        StoreErrorKind::Denied => step.advise(
            Client,
            "give user and password in the proxy's URL: http://USER:PASSWORD@HOST:PORT, best in \
             HTTPS_PROXY, which other users can't see",
        ),
        _ => step
            .advise(Network, "let the proxy connect to the store (CONNECT to this host and port)")
            .advise(Client, "or bypass it for this host with NO_PROXY, or --store-proxy none"),
    }
}

pub(crate) fn handshake_timed_out() -> Step {
    Step::bad("TLS", "handshake_timeout", "the server doesn't answer the TLS handshake").advise(
        Network,
        "large packets are lost on the path (MTU, VPN), or a firewall inspects the connection",
    )
}

/// Builds the step for a handshake that failed for another reason than the certificate.
pub(crate) fn handshake_failed(failure: TlsFailure, message: String) -> Step {
    match failure {
        TlsFailure::NotTls => Step::bad("TLS", "not_tls", message)
            .advise(Client, "check the port, or use http:// if you trust the network"),
        TlsFailure::Closed => Step::bad("TLS", "closed_during_handshake", message)
            .advise(Server, "check its TLS configuration and its log")
            .advise(Network, "or a middlebox is blocking TLS"),
        _ => Step::bad("TLS", "handshake_failed", message)
            .advise(Server, "allow TLS 1.2 or 1.3 with a cipher that is in use today"),
    }
}
