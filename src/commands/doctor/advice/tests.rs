use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use nbd_server::client::ExportInfo;
use nbd_server::wire::handshake::{Greeting, HandshakeFlags};
use nbd_server::wire::info::{BlockSizes, TransmissionFlags};
use nbd_server::wire::option::{Opt, Rep};
use nbd_server::wire::reply::ErrorCode;
use rustls::{AlertDescription, CertificateError, Error, RootCertStore};

use super::*;
use crate::cli::server_target::TlsUse;
use crate::commands::doctor::certificate::{CaCertificate, TrustedCas};
use crate::commands::doctor::connect::{Address, ConnectFailure};
use crate::commands::doctor::greeting::{ForeignProtocol, ServerGreeting};
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::{Outcome, Side, Step};

fn advice(step: &Step) -> String {
    let lines = step.advice.iter().map(|advice| format!("{}: {}", advice.side, advice.text));
    lines.collect::<Vec<_>>().join("\n")
}

/// Asserts that the step is bad and that its advice for `side` contains `words`.
#[track_caller]
fn assert_bad(step: &Step, side: Side, words: &str) {
    assert_eq!(step.outcome, Outcome::Bad, "{step:?}");
    let found = step.advice.iter().any(|advice| advice.side == side && advice.text.contains(words));
    assert!(found, "no \"{words}\" for the {side}: {}", advice(step));
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
    assert_bad(
        &of(tcp(), kind(ErrorKind::ConnectionRefused)),
        Server,
        "nothing listens on that port",
    );
    assert_bad(&of(tcp(), ConnectFailure::Timeout), Network, "a firewall on the way");
    assert_bad(&of(tcp(), kind(ErrorKind::TimedOut)), Network, "packets are dropped");
    assert_bad(&of(tcp(), kind(ErrorKind::HostUnreachable)), Network, "no route");
    assert_bad(&of(tcp(), kind(ErrorKind::ConnectionReset)), Server, "--allow");
    assert_bad(&of(unix(), kind(ErrorKind::NotFound)), Client, "no such socket");
    assert_bad(&of(unix(), kind(ErrorKind::ConnectionRefused)), Server, "nobody listens on it");
    assert_bad(&of(unix(), kind(ErrorKind::PermissionDenied)), Server, "write to it");
    assert_bad(&unresolved("nbd.example.org", "x"), Client, "spelled");

    // One address of the name fails: a client connects only if it tries the others.
    let failed = [(tcp(), ConnectFailure::Timeout, "no answer".to_owned())];
    let step = connected(&unix(), &failed);
    assert_eq!(step.outcome, Outcome::Warning);
    assert!(step.lines[0].contains("192.0.2.7:10809: no answer"));
    assert_eq!(connected(&tcp(), &[]).outcome, Outcome::Good);
}

#[test]
fn greetings_are_assessed() {
    let second = Duration::from_secs(1);
    let new = |flags| greeting(&ServerGreeting::Newstyle(Greeting { flags }), second);
    assert_eq!(new(HandshakeFlags::FIXED_NEWSTYLE).outcome, Outcome::Good);
    assert_bad(&new(HandshakeFlags::default()), Server, "so old");
    assert_bad(&greeting(&ServerGreeting::Oldstyle, second), Server, "before 2011");
    assert_bad(&greeting(&ServerGreeting::Closed, second), Server, "--allow");
    assert_bad(&greeting(&ServerGreeting::Closed, second), Server, "hosts.deny");
    assert_bad(&greeting(&ServerGreeting::Silence, second), Server, "speaks first");
    assert_bad(&greeting(&ServerGreeting::Partial(3), second), Server, "its log");
    for (protocol, words) in [
        (ForeignProtocol::Ssh, "SSH"),
        (ForeignProtocol::Http, "HTTP"),
        (ForeignProtocol::Vnc, "VNC"),
        (ForeignProtocol::Mail, "mail"),
    ] {
        let step = greeting(&ServerGreeting::Foreign(protocol), second);
        assert!(step.found.contains(words), "{step:?}");
        assert_bad(&step, Client, "10809");
    }
    assert_bad(
        &greeting(&ServerGreeting::Foreign(ForeignProtocol::Tls), second),
        Server,
        "STARTTLS",
    );
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
    assert_eq!((good.outcome, good.found.as_str()), (Outcome::Good, "TLS is required"));
    assert_bad(&step(required(), None, TlsUse::Never, true), Client, "nbds://");
    let broken = step(required(), no(Rep::ERR_POLICY), TlsUse::IfOffered, false);
    assert_bad(&broken, Server, "requires TLS and refuses it");

    let offered = step(Ok(1), Some(Ok(())), TlsUse::IfOffered, false);
    assert_eq!(offered.outcome, Outcome::Warning);
    assert!(advice(&offered).contains("server: whoever connects without TLS"));
    assert_eq!(step(Ok(1), Some(Ok(())), TlsUse::IfOffered, true).outcome, Outcome::Good);
    let unknown = step(Err(ProbeError::Closed), Some(Ok(())), TlsUse::IfOffered, false);
    assert_eq!((unknown.outcome, unknown.found.as_str()), (Outcome::Good, "TLS is offered"));

    for reply in [Rep::ERR_UNSUP, Rep::ERR_POLICY] {
        assert_bad(&step(Ok(1), no(reply), TlsUse::Always, true), Server, "--tls-cert");
        let across = step(Ok(1), no(reply), TlsUse::IfOffered, false);
        assert_eq!(across.outcome, Outcome::Warning);
        assert!(advice(&across).contains("network: without TLS anybody"));
        assert_eq!(step(Ok(1), no(reply), TlsUse::IfOffered, true).outcome, Outcome::Good);
    }
    let gone = step(Ok(1), Some(Err(ProbeError::Closed)), TlsUse::IfOffered, true);
    assert_bad(&gone, Server, "has to answer STARTTLS");
}

#[test]
fn tls_alerts_are_explained() {
    let nobody = ClientAuthState::default();
    let asked = ClientAuthState { is_certificate_requested: true, has_certificate: false };
    let shown = ClientAuthState { is_certificate_requested: true, has_certificate: true };
    let of =
        |alert, observed| handshake_failed(&ProbeError::Tls(Error::AlertReceived(alert)), observed);
    for (alert, observed, name, side, words) in [
        (AlertDescription::CertificateRequired, asked, "client certificate", Client, "--tls-cert"),
        (AlertDescription::HandshakeFailure, asked, "client certificate", Client, "--tls-cert"),
        (AlertDescription::BadCertificate, asked, "client certificate", Client, "--tls-cert"),
        (AlertDescription::UnknownCA, shown, "client certificate", Server, "--tls-client-ca"),
        (AlertDescription::CertificateExpired, shown, "client certificate", Client, "a new one"),
        (AlertDescription::CertificateRevoked, shown, "client certificate", Client, "a new one"),
        (
            AlertDescription::UnsupportedCertificate,
            shown,
            "client certificate",
            Client,
            "clientAuth",
        ),
        (AlertDescription::BadCertificate, shown, "client certificate", Server, "its log"),
        (AlertDescription::DecryptError, shown, "client certificate", Server, "same name"),
        (AlertDescription::ProtocolVersion, nobody, "TLS", Server, "1.2 or newer"),
        (AlertDescription::HandshakeFailure, nobody, "TLS", Server, "pre-shared keys"),
        (AlertDescription::InsufficientSecurity, nobody, "TLS", Server, "ECDHE"),
        (AlertDescription::UnrecognisedName, nobody, "TLS", Client, "--tls-hostname"),
        (AlertDescription::InternalError, nobody, "TLS", Server, "its log"),
    ] {
        let step = of(alert, observed);
        assert_eq!(step.name, name, "{alert:?}");
        assert_bad(&step, side, words);
        assert!(step.lines[0].contains("TLS fails"), "{step:?}");
    }
    assert_bad(&handshake_failed(&ProbeError::Closed, nobody), Server, "its TLS isn't set up");
    assert_bad(&handshake_failed(&ProbeError::Closed, asked), Client, "--tls-cert");
    assert_bad(&handshake_failed(&ProbeError::Timeout, nobody), Network, "MTU");
    let garbage = Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType);
    assert_bad(
        &handshake_failed(&ProbeError::Tls(garbage), nobody),
        Server,
        "acknowledges STARTTLS",
    );

    // With TLS 1.3 the alert arrives after the handshake.
    let late = ProbeError::Tls(Error::AlertReceived(AlertDescription::CertificateRequired));
    assert_bad(&rejected_after_handshake(&late, asked).unwrap(), Client, "--tls-cert");
    assert_bad(&rejected_after_handshake(&ProbeError::Closed, shown).unwrap(), Server, "Its log");
    assert!(rejected_after_handshake(&ProbeError::Closed, nobody).is_none());

    assert_eq!(client_certificate(nobody).outcome, Outcome::Good);
    assert_eq!(client_certificate(shown).outcome, Outcome::Good);
    let unasked = client_certificate(ClientAuthState {
        is_certificate_requested: false,
        has_certificate: true,
    });
    assert_eq!(unasked.outcome, Outcome::Warning);
    let old = older_tls(Err(&ProbeError::Closed));
    assert_eq!(old.outcome, Outcome::Warning);
    assert!(advice(&old).contains("nbd-client"));
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
    let of = |error, issuer: &str| {
        untrusted(&Error::InvalidCertificate(error), issuer, &given(true, None))
    };
    let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
    assert_bad(&untrusted(&unknown, "CN=x", &given(false, None)), Client, "is no CA");
    assert_bad(&untrusted(&unknown, "CN=our CA", &given(true, Some("weak"))), Server, "weak");
    assert_bad(&untrusted(&unknown, "CN=x", &given(true, Some("weak"))), Client, "CN=x");
    let expired_ca = Error::InvalidCertificate(CertificateError::Expired);
    assert_bad(&untrusted(&expired_ca, "CN=x", &given(false, None)), Server, "in between");
    assert_bad(&of(CertificateError::UnknownIssuer, "CN=other CA"), Client, "CN=other CA");
    assert_bad(&of(CertificateError::UnknownIssuer, "CN=other CA"), Server, "append");
    assert_bad(&of(CertificateError::UnknownIssuer, "CN=our CA"), Client, "another key");
    assert_bad(&of(CertificateError::BadSignature, "CN=our CA"), Client, "another key");
    assert_bad(&of(CertificateError::InvalidPurpose, ""), Server, "serverAuth");
    assert_bad(&of(CertificateError::Revoked, ""), Server, "a new one");
    assert_bad(&of(CertificateError::Expired, ""), Server, "in between");

    let names = ["a.example.org".to_owned(), "b.example.org".to_owned()];
    assert_bad(&wrong_name("192.0.2.7", &names), Client, "a.example.org, b.example.org");
    assert_bad(&wrong_name("192.0.2.7", &names), Server, "subject alternative names");
    assert_bad(&wrong_name("x", &[]), Server, "names x");
    assert_eq!(unverified(true, "x").outcome, Outcome::Warning);
    assert!(advice(&unverified(false, "x")).contains("it isn't for x"));

    let now = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let ago = Duration::from_secs(3 * 24 * 3600);
    let old = expired(Step::good("certificate", ""), ago, now);
    assert_bad(&old, Client, "clock");
    assert!(old.lines[0].contains("3 days ago"), "{old:?}");
    assert!(old.lines[0].contains("2001-09-09T01:46:40Z"), "{old:?}");
    assert_bad(&not_yet_valid(Step::good("certificate", ""), ago, now), Client, "clock");
    for (seconds, words) in [(59, "0 minutes"), (7199, "119 minutes"), (7200, "2 hours")] {
        assert_eq!(format_validity(Duration::from_secs(seconds)), words);
    }
}

#[test]
fn export_lists_are_bounded_and_escaped() {
    let one = |name: &str| (name.to_owned(), String::new());
    assert_eq!(listed(&[]).outcome, Outcome::Warning);
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

    assert_eq!(list_failed(&refused(Opt::LIST, Rep::ERR_POLICY)).outcome, Outcome::Warning);
    assert_bad(&list_failed(&ProbeError::Closed), Server, "log");
    assert_bad(&list_failed(&ProbeError::ProtocolViolation("x".to_owned())), Server, "no client");
}

#[test]
fn refused_exports_are_explained() {
    let listed = [("a".to_owned(), String::new())];
    let of = |reply| open_failed("x", &refused(Opt::GO, reply), &listed);
    assert_bad(&of(Rep::ERR_UNKNOWN), Client, "\"a\"");
    assert_bad(&open_failed("x", &refused(Opt::GO, Rep::ERR_UNKNOWN), &[]), Server, "no export");
    assert_bad(&of(Rep::ERR_POLICY), Server, "rules");
    assert_bad(&of(Rep::ERR_TLS_REQD), Client, "nbds://");
    assert_bad(&of(Rep::ERR_BLOCK_SIZE_REQD), Client, "block sizes");
    assert_bad(&of(Rep::ERR_SHUTDOWN), Server, "about to end");
    assert_bad(&open_failed("", &ProbeError::Closed, &listed), Server, "missing");
}

#[test]
fn export_size_block_sizes_and_flags_are_assessed() {
    let sizes = |minimum, preferred, maximum| Some(BlockSizes { minimum, preferred, maximum });
    let of =
        |size, block_sizes| export("x", &ExportInfo { size, block_sizes, ..ExportInfo::default() });
    assert_eq!(of(1 << 20, None).outcome, Outcome::Good);
    assert_eq!(of(1 << 20, sizes(1, 4096, 1 << 25)).outcome, Outcome::Good);
    let odd = of(1000, None);
    assert_eq!(odd.outcome, Outcome::Warning);
    assert!(advice(&odd).contains("the last 488 bytes"), "{}", advice(&odd));
    assert_eq!(of(0, None).outcome, Outcome::Warning);
    assert_bad(&of(1 << 63, None), Server, "2^63");
    for bad in [sizes(0, 4096, 1 << 25), sizes(3, 4, 8), sizes(4096, 512, 8192), sizes(512, 512, 1)]
    {
        assert_bad(&of(1 << 20, bad), Server, "specification");
    }
    let large = of(1 << 20, sizes(4096, 4096, 1 << 25));
    assert!(advice(&large).contains("nbd-client -block-size 4096"));

    let flags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::READ_ONLY)
        .with(TransmissionFlags::CAN_MULTI_CONN)
        .with(TransmissionFlags(1 << 15));
    let step = export("", &ExportInfo { flags, size: 512, ..ExportInfo::default() });
    assert_eq!(step.lines[0], "flags: read-only, several connections, others (0x8000)");
    assert_eq!(step.found, "the default export, 512 bytes");
    assert_eq!(of(512, None).lines[0], "flags: writable");
}

#[test]
fn failed_reads_are_explained() {
    let failed = |error| ProbeError::RequestFailed { error, message: String::new() };
    let of = |failure: &ProbeError| read_failed("first read", "4096 bytes at 0", failure);
    assert_bad(&of(&failed(ErrorCode::IO)), Server, "hexz-nbd verify");
    assert_bad(&of(&failed(ErrorCode::INVAL)), Server, "a fault of the server's");
    assert_bad(&of(&failed(ErrorCode::PERM)), Server, "rules");
    assert_bad(&of(&ProbeError::Closed), Server, "crashed");
    assert_bad(&of(&ProbeError::Timeout), Network, "MTU");
    assert_bad(&of(&ProbeError::ProtocolViolation("x".to_owned())), Server, "protocol");
    let said =
        ProbeError::RequestFailed { error: ErrorCode::IO, message: "disk\n gone".to_owned() };
    assert_eq!(of(&said).found, "4096 bytes at 0: it answers with NBD_EIO (\"disk\\n gone\")");
}
