//! `hexz-nbd doctor --store`: examines an object store or an HTTP server as the gateway uses it, step
//! by step.

mod advice;
mod archive;
mod object;
mod speed;
mod transport;

use std::time::{Duration, Instant, SystemTime};

use nbd_gateway::tls::check_not_exposed;
use object_reader::{
    ByteRange, CredentialsSummary, GetRequest, ListedObject, ObjectUrl, ObservedStore, Response,
    ResponseHead, Scheme, StoreError, StoreErrorKind, StoreProbe, Timeouts, Version,
};

use super::report::{Outcome, Report, Side, Step, escape_and_cut};
use crate::cli::{Doctor, SecretUrl};
use crate::service::remote;

/// Maximum number of names of objects that are shown.
const MAX_NAMES: usize = 5;

/// Examines the store of a URL.
pub(super) async fn diagnose(url: &SecretUrl, options: &Doctor) -> Report {
    let mut report = Report::new(escape_and_cut(&without_secrets(&url.0)));
    if let Err(last) = examine(&url.0, options, &mut report).await {
        report.add(last);
    }
    report
}

/// Returns what can be shown of a URL that may be invalid: not its query, and neither user nor
/// password.
fn without_secrets(url: &str) -> String {
    let shown = url.split('?').next().unwrap_or_default();
    match (shown.split_once("://"), shown.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://{rest}"),
        (None, Some((_, rest))) => rest.to_owned(),
        (_, None) => shown.to_owned(),
    }
}

/// Runs the steps in order. The error is the step that ended the examination early.
async fn examine(url: &str, options: &Doctor, report: &mut Report) -> Result<(), Step> {
    let url: ObjectUrl = url.parse().map_err(|error: object_reader::UrlError| {
        let found = escape_and_cut(&error.to_string());
        Step::bad("URL", "invalid_url", found)
            .advise(Side::Client, "give the URL of an archive, or of a folder with archives")
    })?;
    let mut config = remote::config(&options.remote.settings);
    let timeout = options.timeout;
    config.timeouts =
        Timeouts { connect: timeout, first_byte: timeout, stall: timeout, ..Timeouts::default() };
    let probe = config.probe(url.store()).map_err(|error| {
        Step::bad("URL", "invalid_options", escape_and_cut(&error.to_string()))
            .advise(Side::Client, "correct the --store options, or the environment variables")
    })?;
    report.add(target(&url, &probe, config.allow_insecure).map_err(|step| *step)?);
    transport::examine(&probe, timeout, report).await?;

    // Without credentials, the next step fails.
    for path in config.secret_files(url.store()).unwrap_or_default() {
        check_not_exposed(&path).map_err(|it| advice::exposed_credentials(&path, &it))?;
    }
    let store =
        probe.open().map_err(|error| advice::no_credentials(&error, url.store().scheme()))?;
    let credentials = with_timeout(timeout, store.credentials()).await;
    let credentials = credentials.map_err(|error| advice::credentials_failed(&error))?;
    let step = advice::credentials(&credentials, SystemTime::now());
    report.add(step.map_err(|step| *step)?);

    let mut session = Session { store, url, credentials, timeout };
    if session.url.is_folder() {
        session.url = list(&session, report).await?;
    }
    let object = object::examine(&session, report).await?;
    archive::examine(&session, &object, report).await?;
    speed::examine(&session, &object, !options.no_speed, report).await
}

/// Builds the step about the URL, the options, and the server that they lead to.
fn target(url: &ObjectUrl, probe: &StoreProbe, allow_insecure: bool) -> Result<Step, Box<Step>> {
    const NAME: &str = "URL";
    let (host, port) = probe.server();
    let kind = if url.is_folder() { "folder" } else { "object" };
    let key = escape_and_cut(url.key());
    let server = format!("{}:{port}", bracketed(host));
    let scheme = if probe.is_https() { "https" } else { "http" };
    let found = format!("{kind} \"{key}\", served by {scheme}://{server}");
    if probe.is_insecure() && !allow_insecure {
        let step = Step::bad(NAME, "plain_http", found)
            .advise(
                Side::Client,
                "plain http isn't used to other machines, since others on the network can read and \
                 change the data: use https://, or add --store-insecure",
            )
            .advise(Side::Server, "serve over TLS");
        return Err(Box::new(step));
    }
    let mut step = Step::good(NAME, found)
        .detail("store", url.store().to_string())
        .detail("key", url.key())
        .detail("server", server)
        .detail("tls", probe.is_https());
    if let Some((host, port)) = probe.proxy() {
        let proxy = format!("{}:{port}", bracketed(host));
        step = step.line(format!("by the proxy {proxy}")).detail("proxy", proxy);
    }
    if probe.is_insecure() {
        step = step
            .problem(Outcome::Warning, "plain_http")
            .advise(Side::Server, "serve over TLS: others on the network can change the data");
    }
    Ok(step)
}

/// Lists the folder, and returns the URL of an archive in it.
async fn list(session: &Session, report: &mut Report) -> Result<ObjectUrl, Step> {
    let began = Instant::now();
    let store = session.store.store();
    let listed = with_timeout(session.timeout, store.list(session.url.key())).await;
    let head = session.store.take_response();
    let objects =
        listed.map_err(|error| advice::list_failed(&error, head.as_ref(), &session.context()))?;
    let step = advice::listed(&objects).took(began.elapsed());
    let is_archive =
        |object: &&ListedObject| object.name.ends_with(".hxz") || object.name.ends_with(".hexz");
    let first = objects.iter().find(is_archive).or_else(|| objects.first());
    let Some(Ok(url)) = first.map(|object| session.url.with_name(&object.name)) else {
        return Err(step);
    };
    report.add(step.line(format!("continuing with {}", escape_and_cut(url.name()))));
    Ok(url)
}

/// A store whose objects are examined.
struct Session {
    store: ObservedStore,
    /// URL of the object, or at first of the folder.
    url: ObjectUrl,
    credentials: CredentialsSummary,
    timeout: Duration,
}

/// Result of a request for a part of an object.
struct Exchange {
    result: Result<Response, StoreError>,
    /// Head of the response, if there was one.
    head: Option<ResponseHead>,
    took: Duration,
}

/// Circumstances of a failure, which decide on the advice.
#[derive(Debug, Clone, Copy)]
struct Context {
    scheme: Scheme,
    is_anonymous: bool,
    is_signed_url: bool,
}

impl Session {
    fn context(&self) -> Context {
        Context {
            scheme: self.url.store().scheme(),
            is_anonymous: self.credentials.is_anonymous,
            is_signed_url: self.url.store().query().is_some(),
        }
    }

    /// Requests a part of the object `key`.
    async fn get(&self, key: &str, range: ByteRange, version: Option<Version>) -> Exchange {
        let request = GetRequest { range, version, bypass_caches: false };
        let began = Instant::now();
        let result = with_timeout(self.timeout, self.store.store().get(key, &request)).await;
        Exchange { result, head: self.store.take_response(), took: began.elapsed() }
    }
}

async fn with_timeout<T>(
    timeout: Duration,
    answer: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| {
        Err(StoreError {
            kind: StoreErrorKind::TimedOut,
            message: "no complete response within the timeout".to_owned(),
            retry_after: None,
        })
    })
}

/// Returns a host for an authority: an IPv6 address gets brackets.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}
