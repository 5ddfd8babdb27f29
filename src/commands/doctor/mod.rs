//! `hexz-nbd doctor`: connects to any NBD server as a client would, and reports step by step what
//! works and, if something doesn't, what to change and on which side.
//!
//! Pure functions (`advice/`, `certificate.rs`) turn observations into the steps of a report
//! ([`report`]), which is rendered as text or JSON. The server isn't trusted: every step has a
//! timeout, every list is bounded, and everything that is shown is escaped. With `--store`, an object
//! store is examined instead (`store`).

mod advice;
mod certificate;
mod connect;
mod exports;
mod greeting;
mod json;
mod probe;
mod probe_error;
mod report;
#[cfg(feature = "remote")]
mod store;
mod text;
mod tls;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nbd_telemetry::escape;
use rustls::pki_types::ServerName;

use crate::cli::Doctor;
use crate::cli::server_target::{ServerEndpoint, ServerTarget, TlsUse};
use crate::commands::output;
use crate::exit_status::Failure;
use report::{Outcome, Report, Side, Step, escape_and_cut};

use probe::Probe;
use tls::{ClientCredentials, UnusableFile};

/// Time that a pending name lookup may delay the exit of the program.
const EXIT_TIMEOUT: Duration = Duration::from_millis(100);

/// Examines a server or a store, and prints the report.
pub(crate) fn run(options: &Doctor) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(diagnose(options));
    runtime.shutdown_timeout(EXIT_TIMEOUT);
    output::print(if options.json {
        output::pretty_json(&json::render(&report))
    } else {
        text::render(&report)
    })?;
    let is_bad = report.outcome() == Outcome::Bad;
    Ok(if is_bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Examines whichever of server and store is given; the command line has one of them.
async fn diagnose(options: &Doctor) -> Report {
    #[cfg(feature = "remote")]
    if let Some(url) = &options.remote.store {
        return store::diagnose(url, options).await;
    }
    let endpoint = options.server.as_ref().map(|server| server.endpoint.to_string());
    let mut report = Report::new(endpoint.unwrap_or_default());
    if let Some(target) = &options.server
        && let Err(last) = examine(target, options, &mut report).await
    {
        report.add(last);
    }
    report
}

/// Runs the steps in order. The error is the step that ended the examination early.
async fn examine(target: &ServerTarget, options: &Doctor, report: &mut Report) -> Result<(), Step> {
    let credentials = load_client_files(target, options).map_err(|step| *step)?;
    let name = server_name(options, target).map_err(|step| *step)?;
    let (step, addresses) = connect::resolve(&target.endpoint, options.timeout).await;
    step.into_iter().for_each(|step| report.add(step));
    let connected = connect::connect(addresses?, options.timeout).await;
    let (stream, address, step) = connected.map_err(|failed| advice::unconnected(&failed))?;
    report.add(step);

    let (timeout, tls_use) = (options.timeout, tls_use(target, options));
    let probe = Probe { address, timeout, tls_use, credentials, name };
    let greeted = probe.greet(stream, report).await?;
    let plaintext = probe.probe_plaintext(greeted, report).await?;
    let session = probe.negotiate(plaintext, report).await?;
    let is_newest = session.tls.as_deref() == Some("TLS 1.3");
    let (session, listed) = exports::list(&probe, session, report).await?;
    // A URI without a path means the default export, or else the first listed.
    let of_uri = target.export.as_deref().filter(|name| !name.is_empty());
    let export = options.export.as_deref().or(of_uri);
    let transmission = exports::open_export(&probe, session, export, &listed, report).await?;
    exports::read(&probe, transmission, !options.no_speed, report).await?;
    if is_newest {
        report.add(probe.probe_tls_1_2().await);
    }
    Ok(())
}

fn tls_use(target: &ServerTarget, options: &Doctor) -> TlsUse {
    // Naming CAs asks for the server to be authenticated, which takes TLS.
    let verifies = options.tls_ca.is_some() || options.tls_dir.is_some();
    match (options.no_tls, options.require_tls || verifies) {
        (true, _) => TlsUse::Never,
        (_, true) => TlsUse::Always,
        _ => target.tls,
    }
}

fn load_client_files(
    target: &ServerTarget,
    options: &Doctor,
) -> Result<Arc<ClientCredentials>, Box<Step>> {
    let loaded = tls::load(options, target.certificates.as_deref());
    loaded.map(Arc::new).map_err(|unusable| {
        let UnusableFile { path, reason, problem } = unusable;
        let found = format!("can't use {}: {}", escape::path(&path), escape::text(&problem));
        Box::new(Step::bad("own files", reason, found).advise(
            Side::Client,
            "give the CA's certificate, and the client's certificate and key, in PEM format; the \
             server's operator has them",
        ))
    })
}

/// Returns the name that the server's certificate has to be valid for.
fn server_name(options: &Doctor, target: &ServerTarget) -> Result<ServerName<'static>, Box<Step>> {
    let named = options.tls_hostname.as_deref().or(target.hostname.as_deref());
    let name = match (&target.endpoint, named) {
        (_, Some(name)) => name,
        // The zone is the client's own interface, which no certificate names.
        (ServerEndpoint::Tcp { host, .. }, None) => {
            host.split_once('%').map_or(&**host, |(host, _)| host)
        }
        (ServerEndpoint::Unix(_), None) => "localhost",
    };
    ServerName::try_from(name.to_owned()).map_err(|_| {
        let found = format!("\"{}\" can't be a certificate's name", escape_and_cut(name));
        let step = Step::bad("name", "invalid_name", found);
        Box::new(step.advise(Side::Client, "give a DNS name or an IP address with --tls-hostname"))
    })
}
