//! The way to the server: name, connection, proxy, TLS, certificate.

use std::time::{Duration, Instant, SystemTime};

use object_reader::{StoreProbe, TlsFailure, TlsHandshake};
use rustls::pki_types::CertificateDer;

use super::super::connect::{self, Address, BoxedStream};
use super::super::report::{Outcome, Report, Side, Step, escape_and_cut};
use super::{advice, with_timeout};
use crate::cli::server_target::ServerEndpoint;
use crate::commands::output::{format_time, join_first};
use crate::commands::pki::certificate::CertificateInfo;
use crate::service::dialer;

/// Remaining validity of a certificate below which there is a warning.
const EXPIRY_WARNING: Duration = Duration::from_secs(14 * 24 * 3600);
/// Maximum number of names shown.
const MAX_SHOWN: usize = 20;
/// Maximum number of names in a piece of advice.
const FEW: usize = 5;

/// Connects once, and adds the steps of that.
pub(super) async fn examine(
    probe: &StoreProbe,
    timeout: Duration,
    report: &mut Report,
) -> Result<(), Step> {
    let (host, port) = probe.proxy().unwrap_or_else(|| probe.server());
    let endpoint = ServerEndpoint::Tcp { host: host.to_owned(), port };
    let (step, addresses) = connect::resolve(&endpoint, timeout).await;
    step.into_iter().for_each(|step| report.add(step));
    let addresses = permitted(host, addresses?).map_err(|step| *step)?;
    let connected = connect::connect(addresses, timeout).await;
    let (mut stream, _, step) =
        connected.map_err(|failed| advice::unconnected(&failed, probe.proxy().is_some()))?;
    report.add(step);
    if !probe.is_https() {
        return Ok(());
    }
    if probe.proxy().is_some() {
        let began = Instant::now();
        let opened = with_timeout(timeout, probe.open_tunnel(&mut stream)).await;
        opened.map_err(|error| advice::tunnel_failed(&error))?;
        report.add(Step::good("proxy", "it connects to the server").took(began.elapsed()));
    }
    secure(probe, stream, timeout, report).await
}

/// Returns the addresses to which the gateway connects. The error is a step about a name all of
/// whose addresses it refuses.
fn permitted(host: &str, addresses: Vec<Address>) -> Result<Vec<Address>, Box<Step>> {
    let refusal = |address: &Address| match address {
        Address::Tcp(address) => dialer::refusal(host, address.ip()),
        Address::Unix(_) => None,
    };
    let refused = addresses.first().and_then(refusal);
    let permitted: Vec<_> = addresses.into_iter().filter(|it| refusal(it).is_none()).collect();
    match refused {
        Some(what) if permitted.is_empty() => Err(Box::new(advice::address_refused(host, what))),
        _ => Ok(permitted),
    }
}

async fn secure(
    probe: &StoreProbe,
    stream: BoxedStream,
    timeout: Duration,
    report: &mut Report,
) -> Result<(), Step> {
    let began = Instant::now();
    let Ok(handshake) = tokio::time::timeout(timeout, probe.handshake(stream)).await else {
        return Err(advice::handshake_timed_out());
    };
    let (host, _) = probe.server();
    let TlsHandshake { result, certificates } = handshake;
    let certificate = certificates.first().cloned().map(CertificateDer::from);
    let certificate = certificate.and_then(|der| CertificateInfo::from_der(der).ok());
    match result {
        Ok(agreed) => {
            let found = format!("{}, {}, {}", agreed.version, agreed.cipher, agreed.key_exchange);
            report.add(
                Step::good("TLS", found)
                    .detail("version", agreed.version)
                    .detail("cipher", agreed.cipher)
                    .detail("key_exchange", agreed.key_exchange)
                    .took(began.elapsed()),
            );
            let found = format!("trusted, and valid for the name {host}");
            let step = Step::good("certificate", found);
            report.add(match certificate {
                Some(own) => describe(check_expiry(step, &own, SystemTime::now()), &own),
                None => step,
            });
            Ok(())
        }
        Err((failure, message)) => {
            let message = escape_and_cut(&message);
            Err(match certificate {
                Some(own) => describe(rejected(failure, message, &own), &own),
                None => advice::handshake_failed(failure, message),
            })
        }
    }
}

fn check_expiry(step: Step, own: &CertificateInfo, now: SystemTime) -> Step {
    match own.not_after.duration_since(now) {
        Ok(left) if left < EXPIRY_WARNING => step
            .problem(Outcome::Warning, "expires_soon")
            .line(format!("expires in {}", super::super::advice::format_validity(left)))
            .advise(Side::Server, "renew the certificate before it expires"),
        _ => step,
    }
}

/// Builds the step for a certificate that was rejected.
fn rejected(failure: TlsFailure, message: String, own: &CertificateInfo) -> Step {
    const NAME: &str = "certificate";
    let clock = "or correct this machine's clock, if it is wrong";
    match failure {
        TlsFailure::UnknownCa => Step::bad(NAME, "unknown_ca", message)
            .advise(
                Side::Client,
                format!(
                    "give the certificate of the CA that signed it with --store-ca: {}",
                    escape_and_cut(&own.issuer.to_string())
                ),
            )
            .advise(
                Side::Server,
                "or, if an intermediate CA signed it, append that CA's certificate to the server's",
            )
            .advise(Side::Network, "or a middlebox intercepts TLS"),
        TlsFailure::Expired => Step::bad(NAME, "expired", message)
            .advise(Side::Server, "renew the certificate")
            .advise(Side::Client, clock),
        TlsFailure::NotValidYet => Step::bad(NAME, "not_yet_valid", message)
            .advise(Side::Client, "correct this machine's clock, if it is slow"),
        TlsFailure::WrongName => Step::bad(NAME, "wrong_name", message)
            .advise(
                Side::Client,
                format!(
                    "use a name that the certificate has: {}; for a bucket with dots, \
                     --store-style path",
                    join_first(&names(own), FEW)
                ),
            )
            .advise(Side::Server, "or get a certificate for that name"),
        TlsFailure::InvalidCertificate => Step::bad(NAME, "certificate_rejected", message)
            .advise(Side::Server, "use a certificate for servers that conforms to RFC 5280"),
        _ => advice::handshake_failed(failure, message),
    }
}

fn names(own: &CertificateInfo) -> Vec<String> {
    own.names.iter().map(|name| escape_and_cut(&name.to_string())).collect()
}

/// Adds what the certificate says.
fn describe(step: Step, own: &CertificateInfo) -> Step {
    let names = names(own);
    let issuer = escape_and_cut(&own.issuer.to_string());
    let (from, to) = (format_time(own.not_before), format_time(own.not_after));
    step.line(format!("names: {}", join_first(&names, MAX_SHOWN)))
        .line(format!("issuer: {issuer}"))
        .line(format!("valid from {from} to {to}"))
        .detail("names", names.into_iter().take(MAX_SHOWN).collect::<Vec<_>>())
        .detail("issuer", issuer)
        .detail("not_before", from)
        .detail("not_after", to)
        .detail("sha256", own.fingerprint())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_the_gateway_refuses_are_reported() {
        let addresses = |texts: &[&str]| -> Vec<Address> {
            texts.iter().map(|text| Address::Tcp(format!("{text}:443").parse().unwrap())).collect()
        };
        let [loopback, metadata, store] = ["127.0.0.1", "169.254.169.254", "192.0.2.1"];
        for refused in [&[loopback][..], &[metadata, loopback]] {
            let step = permitted("store.example.org", addresses(refused)).unwrap_err();
            assert_eq!(step.reasons, ["store_address_refused"]);
        }
        let found = permitted("store.example.org", addresses(&[loopback, store])).unwrap();
        assert_eq!(found, addresses(&[store]));
        assert!(permitted("localhost", addresses(&[loopback])).is_ok());
        assert!(permitted(loopback, addresses(&[loopback])).is_ok());
    }
}
