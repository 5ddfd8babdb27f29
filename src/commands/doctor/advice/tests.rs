use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use nbd_server::client::ExportInfo;
use nbd_server::wire::handshake::{Greeting, HandshakeFlags};
use nbd_server::wire::info::{BlockSizes, TransmissionFlags};
use nbd_server::wire::option::{Opt, Rep};
use nbd_server::wire::reply::ErrorCode;
use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible, RootCertStore,
};

use super::*;
use crate::cli::server_target::TlsUse;
use crate::commands::doctor::certificate::{CaCertificate, TrustedCas};
use crate::commands::doctor::connect::{Address, ConnectFailure};
use crate::commands::doctor::greeting::{ForeignProtocol, ServerGreeting};
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::{Outcome, Side, Step};

/// Page that lists the labels.
const DOCUMENTED: &str = include_str!("../../../../docs/troubleshooting.md");

/// Asserts the outcome of a step and that it has a problem with this label, which is documented and
/// which there is advice on for `side`.
#[track_caller]
fn assert_problem(step: &Step, outcome: Outcome, side: Side, reason: &str) {
    assert_eq!(step.outcome, outcome, "{step:?}");
    assert!(step.reasons.contains(&reason), "{reason}: {step:?}");
    assert!(DOCUMENTED.contains(&format!("`{reason}`")), "{reason} isn't documented");
    let is_advised = step.advice.iter().any(|it| it.side == side && it.reason == reason);
    assert!(is_advised, "no advice on {reason} for the {side}: {step:?}");
}

#[track_caller]
fn assert_bad(step: &Step, side: Side, reason: &str) {
    assert_problem(step, Outcome::Bad, side, reason);
}

#[track_caller]
fn assert_warning(step: &Step, side: Side, reason: &str) {
    assert_problem(step, Outcome::Warning, side, reason);
}

fn refused(option: Opt, reply: Rep) -> ProbeError {
    ProbeError::OptionRefused { option, reply, message: String::new() }
}

#[test]
fn connection_failures_lead_to_advice() {
    let tcp = || Address::Tcp("192.0.2.7:10809".parse().unwrap());
    let unix = || Address::Unix(PathBuf::from("/run/nbd.sock"));
    let of = |address, what| unconnected(&[(address, what, "why".to_owned())]);
    let kind = ConnectFailure::Io;
    for (address, failure, side, reason) in [
        (tcp(), kind(ErrorKind::ConnectionRefused), Server, "connection_refused"),
        (unix(), kind(ErrorKind::ConnectionRefused), Server, "connection_refused"),
        (tcp(), ConnectFailure::Timeout, Network, "connection_timeout"),
        (tcp(), kind(ErrorKind::TimedOut), Network, "connection_timeout"),
        (tcp(), kind(ErrorKind::HostUnreachable), Network, "no_route"),
        (tcp(), kind(ErrorKind::ConnectionReset), Server, "connection_reset"),
        (unix(), kind(ErrorKind::NotFound), Client, "no_socket"),
        (unix(), kind(ErrorKind::PermissionDenied), Server, "permission_denied"),
    ] {
        assert_bad(&of(address, failure), side, reason);
    }
    assert_eq!(of(tcp(), kind(ErrorKind::AddrInUse)).reasons, ["unreachable"]);
    assert_bad(&unresolved("nbd.example.org", "x"), Client, "unresolved");

    // One address of the name fails: a client connects only if it tries the others.
    let failed = [(tcp(), ConnectFailure::Timeout, "no answer".to_owned())];
    let step = connected(&unix(), &failed);
    assert_warning(&step, Server, "some_addresses_failed");
    assert!(step.lines[0].contains("192.0.2.7:10809: no answer"));
    assert_eq!(connected(&tcp(), &[]).outcome, Outcome::Good);
}

#[test]
fn greetings_are_assessed() {
    let second = Duration::from_secs(1);
    let new = |flags| greeting(&ServerGreeting::Newstyle(Greeting { flags }), second);
    assert_eq!(new(HandshakeFlags::FIXED_NEWSTYLE).outcome, Outcome::Good);
    assert_bad(&new(HandshakeFlags::default()), Server, "not_fixed_newstyle");
    for (observed, reason) in [
        (ServerGreeting::Oldstyle, "oldstyle"),
        (ServerGreeting::Closed, "closed_before_greeting"),
        (ServerGreeting::Silence, "no_greeting"),
        (ServerGreeting::Partial(3), "partial_greeting"),
    ] {
        assert_bad(&greeting(&observed, second), Server, reason);
    }
    for (protocol, label, side) in [
        (ForeignProtocol::Ssh, "ssh", Client),
        (ForeignProtocol::Http, "http", Client),
        (ForeignProtocol::Vnc, "vnc", Client),
        (ForeignProtocol::Mail, "mail", Client),
        (ForeignProtocol::Tls, "tls", Server),
    ] {
        let step = greeting(&ServerGreeting::Foreign(protocol), second);
        assert_eq!(step.details["protocol"], label);
        assert_bad(&step, side, "other_protocol");
    }
    let step = greeting(
        &ServerGreeting::Foreign(ForeignProtocol::Unknown(b"\x1b[31m\n".to_vec())),
        second,
    );
    assert!(step.lines[0].contains("\\x1b[31m"), "{step:?}");
}

#[test]
fn tls_offers_and_refusals_are_assessed() {
    let required = || Err(refused(Opt::LIST, Rep::ERR_TLS_REQD));
    let no = |reply| Some(Err(refused(Opt::STARTTLS, reply)));
    let step = |list, starttls, wanted, is_local| {
        plaintext(&PlaintextProbe { list, starttls }, wanted, is_local)
    };
    let good = step(required(), Some(Ok(())), TlsUse::IfOffered, false);
    assert_eq!((good.outcome, &good.details["tls"]), (Outcome::Good, &"required".into()));
    assert_bad(&step(required(), None, TlsUse::Never, true), Client, "tls_required");
    let broken = step(required(), no(Rep::ERR_POLICY), TlsUse::IfOffered, false);
    assert_bad(&broken, Server, "tls_broken");

    let offered = step(Ok(1), Some(Ok(())), TlsUse::IfOffered, false);
    assert_warning(&offered, Server, "tls_not_required");
    assert_eq!(step(Ok(1), Some(Ok(())), TlsUse::IfOffered, true).outcome, Outcome::Good);
    let unknown = step(Err(ProbeError::Closed), Some(Ok(())), TlsUse::IfOffered, false);
    assert_eq!((unknown.outcome, &unknown.details["tls"]), (Outcome::Good, &"offered".into()));

    for reply in [Rep::ERR_UNSUP, Rep::ERR_POLICY] {
        assert_bad(&step(Ok(1), no(reply), TlsUse::Always, true), Server, "tls_not_offered");
        let across = step(Ok(1), no(reply), TlsUse::IfOffered, false);
        assert_warning(&across, Network, "tls_not_offered");
        assert_eq!(step(Ok(1), no(reply), TlsUse::IfOffered, true).outcome, Outcome::Good);
    }
    let gone = step(Ok(1), Some(Err(ProbeError::Closed)), TlsUse::IfOffered, true);
    assert_bad(&gone, Server, "starttls_unanswered");
}

#[test]
fn tls_alerts_are_explained() {
    let nobody = ClientAuthState::default();
    let asked = ClientAuthState { is_certificate_requested: true, has_certificate: false };
    let shown = ClientAuthState { is_certificate_requested: true, has_certificate: true };
    let of =
        |alert, observed| handshake_failed(&ProbeError::Tls(Error::AlertReceived(alert)), observed);
    for (alert, observed, side, reason) in [
        (AlertDescription::CertificateRequired, asked, Client, "client_certificate_required"),
        (AlertDescription::HandshakeFailure, asked, Client, "client_certificate_required"),
        (AlertDescription::BadCertificate, asked, Client, "client_certificate_required"),
        (AlertDescription::UnknownCA, shown, Server, "client_certificate_unknown_ca"),
        (AlertDescription::CertificateExpired, shown, Client, "client_certificate_expired"),
        (AlertDescription::CertificateRevoked, shown, Client, "client_certificate_revoked"),
        (AlertDescription::UnsupportedCertificate, shown, Client, "client_certificate_unsupported"),
        (AlertDescription::BadCertificate, shown, Server, "client_certificate_rejected"),
        (AlertDescription::DecryptError, shown, Server, "client_certificate_signature"),
        (AlertDescription::ProtocolVersion, nobody, Server, "tls_version"),
        (AlertDescription::HandshakeFailure, nobody, Server, "no_common_parameters"),
        (AlertDescription::InsufficientSecurity, nobody, Server, "no_common_parameters"),
        (AlertDescription::UnrecognisedName, nobody, Client, "unrecognized_name"),
        (AlertDescription::InternalError, nobody, Server, "alert"),
    ] {
        let step = of(alert, observed);
        let is_own = reason.starts_with("client_certificate");
        assert_eq!(step.name, if is_own { "client certificate" } else { "TLS" }, "{alert:?}");
        assert_eq!(step.details["alert"], format!("{alert:?}"));
        assert_bad(&step, side, reason);
    }
    let incompatible = PeerIncompatible::ServerDoesNotSupportTls12Or13;
    for (failure, observed, side, reason) in [
        (ProbeError::Closed, nobody, Server, "closed_after_starttls"),
        (ProbeError::Closed, asked, Client, "client_certificate_required"),
        (ProbeError::Timeout, nobody, Network, "handshake_timeout"),
        (ProbeError::Tls(InvalidMessage::InvalidContentType.into()), nobody, Server, "not_tls"),
        (ProbeError::Tls(incompatible.into()), nobody, Server, "tls_version"),
        (ProbeError::Tls(CertificateError::BadSignature.into()), nobody, Server, "wrong_signature"),
        (ProbeError::Io("x".to_owned()), nobody, Server, "handshake_failed"),
    ] {
        assert_bad(&handshake_failed(&failure, observed), side, reason);
    }

    // With TLS 1.3 the alert arrives after the handshake.
    let late = ProbeError::Tls(Error::AlertReceived(AlertDescription::CertificateRequired));
    for (failure, observed, side, reason) in [
        (&late, asked, Client, "client_certificate_required"),
        (&ProbeError::Closed, shown, Server, "client_certificate_rejected"),
    ] {
        assert_bad(&rejected_after_handshake(failure, observed).unwrap(), side, reason);
    }
    assert!(rejected_after_handshake(&ProbeError::Closed, nobody).is_none());

    assert_eq!(client_certificate(nobody).outcome, Outcome::Good);
    assert_eq!(client_certificate(shown).outcome, Outcome::Good);
    let unasked = ClientAuthState { is_certificate_requested: false, has_certificate: true };
    assert_warning(&client_certificate(unasked), Server, "client_certificate_not_requested");
    assert_warning(&older_tls(Err(&ProbeError::Closed)), Client, "no_tls_1_2");
    assert_warning(&no_second_connection(&ProbeError::Closed), Server, "no_second_connection");
}

#[test]
fn untrusted_certificates_are_explained() {
    let given = |is_ca, fault: Option<&str>| TrustedCas {
        roots: RootCertStore::empty(),
        certificates: vec![CaCertificate {
            subject: "CN=our CA".to_owned(),
            is_ca,
            fault: fault.map(str::to_owned),
        }],
        path: "ca.pem".into(),
    };
    for (error, issuer, given, side, reason) in [
        (CertificateError::UnknownIssuer, "CN=x", given(false, None), Client, "no_ca"),
        (
            CertificateError::UnknownIssuer,
            "CN=our CA",
            given(true, Some("weak")),
            Server,
            "unsupported_ca",
        ),
        (CertificateError::UnknownIssuer, "CN=x", given(true, Some("weak")), Client, "unknown_ca"),
        (CertificateError::UnknownIssuer, "CN=x", given(true, None), Server, "unknown_ca"),
        (CertificateError::UnknownIssuer, "CN=our CA", given(true, None), Client, "ca_key_differs"),
        (CertificateError::BadSignature, "CN=our CA", given(true, None), Client, "ca_key_differs"),
        (CertificateError::InvalidPurpose, "", given(true, None), Server, "not_for_servers"),
        (CertificateError::Revoked, "", given(true, None), Server, "revoked"),
        (CertificateError::Expired, "CN=x", given(false, None), Server, "outside_validity"),
        (CertificateError::Expired, "", given(true, None), Server, "outside_validity"),
        (CertificateError::BadEncoding, "", given(true, None), Server, "certificate_rejected"),
    ] {
        assert_bad(&untrusted(&Error::InvalidCertificate(error), issuer, &given), side, reason);
    }

    let names = ["a.example.org".to_owned(), "b.example.org".to_owned()];
    let step = wrong_name("192.0.2.7", &names);
    assert_bad(&step, Client, "wrong_name");
    assert_bad(&step, Server, "wrong_name");
    assert!(step.advice[0].text.contains("(a.example.org, b.example.org)"), "{step:?}");
    assert_bad(&wrong_name("x", &[]), Server, "wrong_name");
    assert_warning(&unverified(true, "x"), Client, "not_verified");
    assert_warning(&unverified(false, "x"), Client, "wrong_name");
    assert_bad(&also_wrong_name(unsupported("weak"), "x", &names), Client, "wrong_name");
    assert_bad(&unsupported("weak"), Server, "unsupported_certificate");

    let now = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let ago = Duration::from_secs(3 * 24 * 3600);
    let old = expired(Step::good("certificate", ""), ago, now);
    assert_bad(&old, Client, "expired");
    assert!(old.lines[0].contains("3 days"), "{old:?}");
    assert!(old.lines[0].contains("2001-09-09T01:46:40Z"), "{old:?}");
    assert_bad(&not_yet_valid(Step::good("certificate", ""), ago, now), Client, "not_yet_valid");
    for (seconds, expected) in [(59, "0 minutes"), (7199, "119 minutes"), (7200, "2 hours")] {
        assert_eq!(format_validity(Duration::from_secs(seconds)), expected);
    }
}

#[test]
fn export_lists_are_bounded_and_escaped() {
    let one = |name: &str| (name.to_owned(), String::new());
    assert_warning(&listed(&[]), Server, "no_exports");
    assert_eq!(listed(&[one("a")]).lines, ["\"a\""]);
    let many: Vec<_> = (0..5000).map(|number| one(&number.to_string())).collect();
    let step = listed(&many);
    assert_eq!(step.lines.len(), 21);
    assert_eq!(step.lines[20], "and 4980 more");
    assert_eq!(step.details["names"].as_array().unwrap().len(), 1000);
    assert_eq!(step.details["count"], 5000);
    assert_eq!(
        listed(&[("\u{1b}x".to_owned(), "\u{7}".to_owned())]).lines,
        ["\"\\u{1b}x\": \\u{7}"]
    );

    assert_warning(&list_failed(&refused(Opt::LIST, Rep::ERR_POLICY)), Server, "not_listed");
    assert_bad(&list_failed(&ProbeError::Closed), Server, "closed");
    let garbage = ProbeError::ProtocolViolation("x".to_owned());
    assert_bad(&list_failed(&garbage), Server, "protocol_violation");
}

#[test]
fn refused_exports_are_explained() {
    let listed = [("a".to_owned(), String::new())];
    let of = |reply| open_failed("x", &refused(Opt::GO, reply), &listed);
    let unknown = refused(Opt::GO, Rep::ERR_UNKNOWN);
    assert!(of(Rep::ERR_UNKNOWN).advice[0].text.ends_with(": \"a\""));
    assert_bad(&open_failed("x", &unknown, &[]), Server, "unknown_export");
    for (reply, side, reason) in [
        (Rep::ERR_UNKNOWN, Client, "unknown_export"),
        (Rep::ERR_POLICY, Server, "export_not_allowed"),
        (Rep::ERR_TLS_REQD, Client, "tls_required"),
        (Rep::ERR_BLOCK_SIZE_REQD, Client, "block_size_required"),
        (Rep::ERR_SHUTDOWN, Server, "shutting_down"),
        (Rep::ERR_TOO_BIG, Server, "option_refused"),
    ] {
        assert_bad(&of(reply), side, reason);
    }
    assert_bad(&open_failed("", &ProbeError::Closed, &listed), Server, "closed");
}

#[test]
fn export_size_block_sizes_and_flags_are_assessed() {
    let sizes = |minimum, preferred, maximum| Some(BlockSizes { minimum, preferred, maximum });
    let of =
        |size, block_sizes| export("x", &ExportInfo { size, block_sizes, ..ExportInfo::default() });
    assert_eq!(of(1 << 20, None).outcome, Outcome::Good);
    assert_eq!(of(1 << 20, sizes(1, 4096, 1 << 25)).outcome, Outcome::Good);
    let odd = of(1000, None);
    assert_warning(&odd, Server, "size_not_multiple_of_512");
    assert!(odd.advice[0].text.contains("488 bytes"), "{odd:?}");
    assert_warning(&of(0, None), Server, "empty_export");
    assert_bad(&of(1 << 63, None), Server, "size_too_large");
    for bad in [sizes(0, 4096, 1 << 25), sizes(3, 4, 8), sizes(4096, 512, 8192), sizes(512, 512, 1)]
    {
        assert_bad(&of(1 << 20, bad), Server, "invalid_block_sizes");
    }
    let large = of(1 << 20, sizes(4096, 4096, 1 << 25));
    assert_warning(&large, Client, "large_minimum_block_size");
    assert!(large.advice[0].text.ends_with("-block-size 4096"), "{large:?}");

    let flags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::READ_ONLY)
        .with(TransmissionFlags::CAN_MULTI_CONN)
        .with(TransmissionFlags(1 << 15));
    let step = export("", &ExportInfo { flags, size: 512, ..ExportInfo::default() });
    let flags = ["read-only", "multiple connections", "other (0x8000)"];
    assert_eq!(step.details["flags"], serde_json::json!(flags));
    assert_eq!(of(512, None).details["flags"], serde_json::json!(["writable"]));
}

#[test]
fn failed_reads_are_explained() {
    let failed = |error| ProbeError::RequestFailed { error, message: String::new() };
    let of = |failure: &ProbeError| read_failed("first read", "4096 bytes at 0", failure);
    for (failure, side, reason) in [
        (failed(ErrorCode::IO), Server, "read_error"),
        (failed(ErrorCode::INVAL), Server, "read_rejected"),
        (failed(ErrorCode::PERM), Server, "read_not_allowed"),
        (failed(ErrorCode::SHUTDOWN), Server, "shutting_down"),
        (failed(ErrorCode::NOMEM), Server, "request_failed"),
        (ProbeError::Closed, Server, "closed"),
        (ProbeError::Timeout, Network, "timeout"),
        (ProbeError::ProtocolViolation("x".to_owned()), Server, "protocol_violation"),
        (ProbeError::Tls(Error::DecryptError), Server, "tls_error"),
        (ProbeError::Io("x".to_owned()), Server, "io_error"),
    ] {
        assert_bad(&of(&failure), side, reason);
    }
    let message = "disk\n gone".to_owned();
    let step = of(&ProbeError::RequestFailed { error: ErrorCode::IO, message });
    assert!(step.found.ends_with("NBD_EIO (\"disk\\n gone\")"), "{step:?}");
}
