//! Advice on the TLS handshake and on the client's certificate.

use std::time::SystemTime;

use nbd_gateway::tls::is_renewal_due;
use rustls::{AlertDescription, Error, PeerIncompatible};

use super::{Client, Network, Server, format_validity};
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::{Outcome, Step};
use crate::commands::output::format_time;

/// Names of the steps.
const TLS: &str = "TLS";
const CLIENT_CERTIFICATE: &str = "client certificate";
const TLS_1_2: &str = "TLS 1.2";

const ALLOW_TLS_1_2: &str = "TLS 1.0 and 1.1 are insecure: allow 1.2 or newer";
const GIVE_CERTIFICATE: &str = "give a certificate from a CA that the server trusts (--tls-cert and \
    --tls-key; libnbd: tls-certificates=DIR with client-cert.pem and client-key.pem; nbd-client: \
    -certfile and -keyfile)";

/// State of client authentication when a handshake fails, or shortly after it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ClientAuthState {
    /// True if the server has asked for a client certificate.
    pub(crate) is_certificate_requested: bool,
    /// True if this client has a certificate to present.
    pub(crate) has_certificate: bool,
}

/// Builds the step for a handshake that failed for a reason other than an untrusted server.
pub(crate) fn handshake_failed(failure: &ProbeError, observed: ClientAuthState) -> Step {
    let step = match failure {
        ProbeError::Tls(Error::AlertReceived(alert)) => alert_received(*alert, observed),
        ProbeError::Tls(Error::InvalidMessage(_)) => {
            Step::bad(TLS, "not_tls", "the server doesn't speak TLS after STARTTLS").advise(
                Server,
                "it acknowledges STARTTLS without implementing it: use a newer one; or a proxy on \
                 the path changes the data",
            )
        }
        ProbeError::Tls(Error::PeerIncompatible(reason)) => incompatible(reason),
        ProbeError::Closed | ProbeError::Timeout if observed.is_certificate_requested => {
            client_certificate_rejected_silently(observed)
        }
        ProbeError::Closed => Step::bad(
            TLS,
            "closed_after_starttls",
            "the server closed the connection after STARTTLS",
        )
        .advise(
            Server,
            "its TLS isn't set up or failed: certificate or key are missing or unreadable, \
                     it has pre-shared keys only, or no cipher in common; check its log",
        )
        .advise(Network, "or a middlebox is blocking TLS"),
        ProbeError::Timeout => {
            Step::bad(TLS, "handshake_timeout", "the server doesn't answer the TLS handshake")
                .advise(Server, "it hangs; check its log")
                .advise(
                    Network,
                    "or large packets are lost on the path (MTU, VPN): a greeting is small, a \
                     certificate isn't",
                )
        }
        ProbeError::Tls(Error::InvalidCertificate(_)) => {
            let found = "the server's signature doesn't match its certificate";
            Step::bad(TLS, "wrong_signature", found).advise(
                Server,
                "its key doesn't belong to the certificate, or it uses an unsupported algorithm",
            )
        }
        other => {
            return Step::bad(TLS, "handshake_failed", other.to_string())
                .advise(Server, "check its log for the handshake");
        }
    };
    step.line(failure.to_string())
}

/// Builds the step for a server that asked for a certificate and then gave up without an alert.
fn client_certificate_rejected_silently(observed: ClientAuthState) -> Step {
    let step = |reason| {
        let found = "the server asks for a certificate, and then closes the connection";
        Step::bad(CLIENT_CERTIFICATE, reason, found).detail("asked_for", true)
    };
    if observed.has_certificate {
        step("client_certificate_rejected").advise(
            Server,
            "it doesn't accept this client's certificate: it doesn't trust the CA that signed it, \
             or the certificate has expired or been revoked; check its log",
        )
    } else {
        step("client_certificate_required").advise(Client, GIVE_CERTIFICATE)
    }
}

/// Builds the step for an alert from the server.
fn alert_received(alert: AlertDescription, observed: ClientAuthState) -> Step {
    let own = |reason, found: &str| {
        let step = Step::bad(CLIENT_CERTIFICATE, reason, found);
        step.detail("asked_for", true).detail("accepted", false)
    };
    let step = match alert {
        AlertDescription::CertificateRequired => {
            own("client_certificate_required", "the server requires one")
                .advise(Client, GIVE_CERTIFICATE)
        }
        AlertDescription::UnknownCA
            if observed.has_certificate || observed.is_certificate_requested =>
        {
            own("client_certificate_unknown_ca", "the server doesn't trust the CA that signed it")
                .advise(
                    Server,
                    "add that CA to the trusted ones (hexz-nbd --tls-client-ca; nbdkit and qemu: \
                     ca-cert.pem; nbd-server: cacertfile)",
                )
                .advise(Client, "or use a certificate from a CA that the server trusts")
        }
        AlertDescription::CertificateExpired => {
            own("client_certificate_expired", "expired, according to the server")
                .advise(Client, "get a new one")
                .advise(Server, "or correct its clock, if it is wrong")
        }
        AlertDescription::CertificateRevoked => {
            own("client_certificate_revoked", "revoked, according to the server")
                .advise(Client, "get a new one")
        }
        AlertDescription::UnsupportedCertificate => {
            own("client_certificate_unsupported", "not for clients, according to the server")
                .advise(Client, "get one with the extended key usage clientAuth")
        }
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied
            if observed.has_certificate =>
        {
            own("client_certificate_rejected", "the server rejects it").advise(
                Server,
                "check its log for the reason: another CA, expired, revoked, or not for clients",
            )
        }
        AlertDescription::BadCertificate
        | AlertDescription::HandshakeFailure
        | AlertDescription::AccessDenied
        | AlertDescription::NoCertificate
            if observed.is_certificate_requested && !observed.has_certificate =>
        {
            own("client_certificate_required", "the server requires one")
                .advise(Client, GIVE_CERTIFICATE)
        }
        AlertDescription::DecryptError if observed.has_certificate => own(
            "client_certificate_signature",
            "its signature is wrong, according to the server",
        )
        .advise(
            Server,
            "it may trust another CA with the same name: give it the right CA's certificate",
        ),
        AlertDescription::ProtocolVersion => tls_version(),
        AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity => {
            Step::bad(TLS, "no_common_parameters", "no cipher or key exchange in common")
                .advise(
                    Server,
                    "it may accept pre-shared keys only (nbdkit --tls-psk, qemu's tls-creds-psk), \
                     which neither doctor nor nbd-client supports: give it a certificate as well",
                )
                .advise(
                    Server,
                    "or it has no usable certificate, or allows only ciphers without forward \
                     secrecy: allow ECDHE with AES-GCM or ChaCha20",
                )
        }
        AlertDescription::UnrecognisedName => {
            Step::bad(TLS, "unrecognized_name", "the server doesn't have that name")
                .advise(Client, "give a name that the server has (--tls-hostname)")
        }
        _ => Step::bad(TLS, "alert", "the server aborts the handshake")
            .advise(Server, "check its log for the reason; the alert that it sent is shown above"),
    };
    step.detail("alert", format!("{alert:?}"))
}

fn tls_version() -> Step {
    Step::bad(TLS, "tls_version", "the server supports neither TLS 1.2 nor 1.3")
        .advise(Server, ALLOW_TLS_1_2)
}

fn incompatible(reason: &PeerIncompatible) -> Step {
    match reason {
        PeerIncompatible::ServerDoesNotSupportTls12Or13
        | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig => tls_version(),
        _ => Step::bad(TLS, "no_common_parameters", "no TLS parameters in common").advise(
            Server,
            "allow ECDHE (X25519, P-256 or P-384) with AES-GCM or ChaCha20, and use a certificate \
             with an ECDSA, Ed25519 or RSA key (2048 bits or more)",
        ),
    }
}

/// Builds the step for a first option inside TLS that wasn't answered. With TLS 1.3 the client
/// learns only then that its certificate was rejected. Returns `None` if the failure has another
/// reason.
pub(crate) fn rejected_after_handshake(
    failure: &ProbeError,
    observed: ClientAuthState,
) -> Option<Step> {
    let step = match failure {
        ProbeError::Tls(Error::AlertReceived(alert)) => alert_received(*alert, observed),
        ProbeError::Closed if observed.is_certificate_requested => {
            client_certificate_rejected_silently(observed)
        }
        _ => return None,
    };
    Some(step.line(failure.to_string()))
}

pub(crate) fn client_certificate(observed: ClientAuthState) -> Step {
    let good = |found| Step::good(CLIENT_CERTIFICATE, found);
    let step = match (observed.is_certificate_requested, observed.has_certificate) {
        (false, false) => good("not requested"),
        (false, true) => Step::warning(
            CLIENT_CERTIFICATE,
            "client_certificate_not_requested",
            "not requested, so it wasn't presented",
        )
        .advise(
            Server,
            "to admit only some clients, it must request certificates (hexz-nbd --tls-client-ca, \
             nbdkit --tls-verify-peer, qemu's verify-peer=yes, nbd-server cacertfile)",
        ),
        (true, true) => good("requested and accepted").detail("accepted", true),
        (true, false) => good("requested, but not required"),
    };
    step.detail("asked_for", observed.is_certificate_requested)
}

/// Adds that the client's own certificate expires soon. That it has expired is known from the
/// server, which then rejects it.
pub(crate) fn client_certificate_expiry(
    step: Step,
    not_before: SystemTime,
    not_after: SystemTime,
    now: SystemTime,
) -> Step {
    let lifetime = not_after.duration_since(not_before).unwrap_or_default();
    let step = step.detail("not_after", format_time(not_after));
    match not_after.duration_since(now) {
        Ok(left) if is_renewal_due(lifetime, left) => step
            .problem(Outcome::Warning, "client_certificate_expires_soon")
            .line(format!("the certificate expires in {}", format_validity(left)))
            .advise(Client, "renew the certificate (hexz-nbd pki renew NAME, on the CA's machine)"),
        _ => step,
    }
}

/// Builds the step for a server that took the first connection, but not another one.
pub(crate) fn no_second_connection(failure: &ProbeError) -> Step {
    Step::warning(TLS_1_2, "no_second_connection", "not tested: no second connection")
        .line(failure.to_string())
        .advise(
            Server,
            "it accepts one client at a time, or exits after the first (qemu-nbd without \
             --persistent and --shared, nbd-server -d, nbdkit --filter=limit): allow more, so that \
             clients can reconnect",
        )
}

/// Builds the step that reports whether a server that speaks TLS 1.3 also accepts TLS 1.2.
pub(crate) fn older_tls(spoken: Result<(), &ProbeError>) -> Step {
    match spoken {
        Ok(()) => Step::good(TLS_1_2, "supported, too").detail("spoken", true),
        Err(failure) => Step::warning(TLS_1_2, "no_tls_1_2", "not supported")
            .line(failure.to_string())
            .detail("spoken", false)
            .advise(
                Client,
                "nbd-client 3.24 and older can't connect, because they lack TLS 1.3; libnbd and \
                 qemu can",
            )
            .advise(Server, "allow TLS 1.2 if nbd-client is used (hexz-nbd: --tls-min 1.2)"),
    }
}
