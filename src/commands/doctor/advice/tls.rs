//! Advice on the TLS handshake and on the client's certificate.

use rustls::{AlertDescription, Error, PeerIncompatible};

use super::{Client, Network, Server};
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::Step;

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
    const NAME: &str = "TLS";
    let words = |text: &str| Step::bad(NAME, text).line(failure.describe());
    match failure {
        ProbeError::Tls(Error::AlertReceived(alert)) => {
            alert_received(*alert, observed).line(failure.describe())
        }
        ProbeError::Tls(Error::InvalidMessage(_)) => {
            words("after STARTTLS the server sends something else than TLS").advise(
                Server,
                "it acknowledges STARTTLS and doesn't do it: take a newer one; or a proxy in \
                 between changes what is sent",
            )
        }
        ProbeError::Tls(Error::PeerIncompatible(reason)) => {
            incompatible(reason).line(failure.describe())
        }
        ProbeError::Closed | ProbeError::Timeout if observed.is_certificate_requested => {
            client_certificate_rejected_silently(observed).line(failure.describe())
        }
        ProbeError::Closed => words("the server closes the connection after STARTTLS")
            .advise(
                Server,
                "its TLS isn't set up or broke down: a missing or unreadable certificate or key, \
                 pre-shared keys only, no cipher in common; its log says which",
            )
            .advise(Network, "or something in between lets TLS not through"),
        ProbeError::Timeout => words("the server doesn't answer the TLS handshake")
            .advise(Server, "it hangs, or waits for entropy or a lock; its log may say more")
            .advise(
                Network,
                "or large packets get lost on the way (MTU, VPN): a small greeting passes, and a \
                 certificate doesn't",
            ),
        ProbeError::Tls(Error::InvalidCertificate(_)) => {
            words("the server's signature doesn't fit its certificate").advise(
                Server,
                "the key isn't that of the certificate; or it uses an algorithm that isn't known \
                 here",
            )
        }
        other => Step::bad(NAME, other.describe())
            .advise(Server, "see its log for what it makes of the handshake"),
    }
}

/// Builds the step for a server that asked for a certificate and then gave up without an alert.
fn client_certificate_rejected_silently(observed: ClientAuthState) -> Step {
    let step = Step::bad("client certificate", "the server asks for one, and then gives up")
        .detail("asked_for", true);
    if observed.has_certificate {
        step.advise(
            Server,
            "it doesn't accept this client's certificate: is the CA that signed it among those \
             that the server trusts, and has it expired or been revoked? Its log says which",
        )
    } else {
        step.advise(Client, GIVE_CERTIFICATE)
    }
}

const GIVE_CERTIFICATE: &str = "it wants a client certificate: give one that a CA has signed which \
    the server trusts (--tls-cert and --tls-key; libnbd: tls-certificates=DIR with client-cert.pem \
    and client-key.pem; nbd-client: -certfile and -keyfile)";

/// Builds the step for an alert from the server.
fn alert_received(alert: AlertDescription, observed: ClientAuthState) -> Step {
    const OWN: &str = "client certificate";
    let own =
        |found: &str| Step::bad(OWN, found).detail("asked_for", true).detail("accepted", false);
    let tls = |found: &str| Step::bad("TLS", found);
    let step = match alert {
        AlertDescription::CertificateRequired => {
            own("the server requires one").advise(Client, GIVE_CERTIFICATE)
        }
        AlertDescription::UnknownCA if observed.has_certificate || observed.is_certificate_requested => own(
            "the server doesn't know the CA that signed it",
        )
        .advise(
            Server,
            "add that CA to those of its clients (hexz-nbd --tls-client-ca; nbdkit and qemu: \
                     ca-cert.pem; nbd-server: cacertfile)",
        )
        .advise(Client, "or take a certificate of the CA that the server trusts"),
        AlertDescription::CertificateExpired => own("it has expired, says the server")
            .advise(Client, "get a new one")
            .advise(Server, "or is its clock wrong?"),
        AlertDescription::CertificateRevoked => {
            own("it has been revoked, says the server").advise(Client, "get a new one")
        }
        AlertDescription::UnsupportedCertificate => own("it isn't for clients, says the server")
            .advise(Client, "get one with the extended key usage clientAuth"),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied
            if observed.has_certificate =>
        {
            own("the server doesn't accept it").advise(
                Server,
                "its log says why: another CA, out of its time, revoked, or not for clients",
            )
        }
        AlertDescription::BadCertificate
        | AlertDescription::HandshakeFailure
        | AlertDescription::AccessDenied
        | AlertDescription::NoCertificate
            if observed.is_certificate_requested && !observed.has_certificate =>
        {
            own("the server requires one").advise(Client, GIVE_CERTIFICATE)
        }
        AlertDescription::DecryptError if observed.has_certificate => {
            own("the server says that its signature is wrong").advise(
                Server,
                "it may trust another CA of the same name: give it the right CA's certificate",
            )
        }
        AlertDescription::ProtocolVersion => tls("the server speaks neither TLS 1.2 nor 1.3")
            .advise(Server, "TLS 1.0 and 1.1 are no longer safe: allow 1.2 or newer"),
        AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity => tls(
            "the server finds no way of TLS that both sides know",
        )
        .advise(
            Server,
            "it may want pre-shared keys only (nbdkit --tls-psk, qemu's tls-creds-psk), which \
                     this client and nbd-client don't have: give it a certificate as well",
        )
        .advise(
            Server,
            "or it has no usable certificate, or allows only ciphers without forward \
                     secrecy: allow ECDHE with AES-GCM or ChaCha20",
        ),
        AlertDescription::UnrecognisedName => tls("the server isn't called by that name")
            .advise(Client, "give a name that the server has (--tls-hostname)"),
        _ => tls("the server gives up")
            .advise(Server, "its log may say why; this is the alert that it sent"),
    };
    step.detail("alert", format!("{alert:?}"))
}

fn incompatible(reason: &PeerIncompatible) -> Step {
    match reason {
        PeerIncompatible::ServerDoesNotSupportTls12Or13
        | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig => {
            Step::bad("TLS", "the server speaks neither TLS 1.2 nor 1.3")
                .advise(Server, "TLS 1.0 and 1.1 are no longer safe: allow 1.2 or newer")
        }
        _ => Step::bad("TLS", "the two sides have nothing in common").advise(
            Server,
            "allow ECDHE (X25519, P-256 or P-384) with AES-GCM or ChaCha20, and a certificate with \
             an ECDSA, Ed25519 or RSA key of 2048 bits or more",
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
    match failure {
        ProbeError::Tls(Error::AlertReceived(alert)) => {
            Some(alert_received(*alert, observed).line(failure.describe()))
        }
        ProbeError::Closed if observed.is_certificate_requested => {
            Some(client_certificate_rejected_silently(observed).line(failure.describe()))
        }
        _ => None,
    }
}

pub(crate) fn client_certificate(observed: ClientAuthState) -> Step {
    const NAME: &str = "client certificate";
    let step = match (observed.is_certificate_requested, observed.has_certificate) {
        (false, false) => Step::good(NAME, "none is asked for"),
        (false, true) => Step::warning(NAME, "none is asked for, so this one wasn't shown").advise(
            Server,
            "if only some clients may come in, it has to ask for certificates (hexz-nbd \
             --tls-client-ca, nbdkit --tls-verify-peer, qemu's verify-peer=yes, nbd-server \
             cacertfile)",
        ),
        (true, true) => Step::good(NAME, "the server asks for one and accepts this one")
            .detail("accepted", true),
        (true, false) => Step::good(NAME, "the server asks for one, and lets in without"),
    };
    step.detail("asked_for", observed.is_certificate_requested)
}

/// Builds the step for a server that took the first connection, but not another one.
pub(crate) fn no_second_connection(failure: &ProbeError) -> Step {
    Step::warning("TLS 1.2", "can't be tried: there is no second connection")
        .line(failure.describe())
        .advise(
            Server,
            "it takes one client, or ends with its first one (qemu-nbd without --persistent and \
             --shared, nbd-server -d, nbdkit --filter=limit): let it take more if clients reconnect",
        )
}

/// Builds the step that reports whether a server that speaks TLS 1.3 also accepts TLS 1.2.
pub(crate) fn older_tls(spoken: Result<(), &ProbeError>) -> Step {
    const NAME: &str = "TLS 1.2";
    match spoken {
        Ok(()) => Step::good(NAME, "is spoken, too").detail("spoken", true),
        Err(failure) => Step::warning(NAME, "isn't spoken")
            .line(failure.describe())
            .detail("spoken", false)
            .advise(
                Client,
                "nbd-client 3.24 and older have no TLS 1.3 and can't come in; libnbd and qemu can",
            )
            .advise(Server, "allow TLS 1.2 if nbd-client is to be used (hexz-nbd: --tls-min 1.2)"),
    }
}
