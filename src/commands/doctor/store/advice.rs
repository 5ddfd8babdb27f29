//! Turns observations of a store into steps of the report, with advice on what to change.
//!
//! The functions are pure. This machine is the client, the store is the server.

use std::path::Path;
use std::time::{Duration, SystemTime};

use hexz_reader::ErrorKind;
use nbd_gateway::tls::TlsFileProblem;
use nbd_telemetry::escape;
use object_reader::{
    CredentialsSummary, ListedObject, Response, ResponseHead, Scheme, StoreConfigError, StoreError,
    StoreErrorKind, TlsFailure, Version,
};

use super::super::advice::{format_validity, unconnected as unconnected_to_server};
use super::super::connect::FailedAttempt;
use super::super::report::Side::{Client, Network, Server};
use super::super::report::{Advice, Outcome, Step, escape_and_cut};
use super::speed::{IN_FLIGHT, LARGE_READ};
use super::{Context, MAX_NAMES, Session};
use crate::commands::output::{format_seconds, format_time, join_first, mebibytes_per_second};

/// Deviation of the clock above which there is a warning.
const CLOCK_WARNING: Duration = Duration::from_secs(60);
/// Deviation of the clock above which stores reject signatures.
const CLOCK_LIMIT: Duration = Duration::from_secs(15 * 60);
/// Remaining lifetime of a signed URL below which there is a warning.
const EXPIRY_WARNING: Duration = Duration::from_secs(24 * 3600);
/// Latency above which there is a warning.
const HIGH_LATENCY: Duration = Duration::from_millis(100);
/// Rate below which there is a warning, in MiB per second.
const LOW_RATE: f64 = 10.0;

/// Names of steps.
const CREDENTIALS: &str = "credentials";
const OBJECT: &str = "object";
const IDENTITY: &str = "identity";
pub(super) const RANGES: &str = "ranges";
pub(super) const CONDITIONS: &str = "conditions";
const ENCODING: &str = "encoding";

/// Builds the step for a server, or a proxy, that can't be connected to.
pub(super) fn unconnected(failed: &[FailedAttempt], is_proxy: bool) -> Step {
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

/// Builds the step for a name that leads to an address that stores don't have.
pub(super) fn address_refused(host: &str, what: &str) -> Step {
    let found = format!("the gateway doesn't connect to {host}, since the name resolves to {what}");
    Step::bad("address", "store_address_refused", found)
        .advise(
            Client,
            "if the store runs there, give its address in the URL or in --store-endpoint instead of \
             the name",
        )
        .advise(Network, "or let the name resolve to the store's address: check DNS and /etc/hosts")
}

/// Builds the step for a file with credentials that other users can read.
pub(super) fn exposed_credentials(path: &Path, problem: &TlsFileProblem) -> Step {
    let found = format!("{}: {problem}", escape::path(path));
    Step::bad(CREDENTIALS, problem.label(), found)
        .advise(Client, "let only the user of the gateway read the file: chmod 600")
}

pub(super) fn tunnel_failed(error: &StoreError) -> Step {
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

pub(super) fn handshake_timed_out() -> Step {
    Step::bad("TLS", "handshake_timeout", "the server doesn't answer the TLS handshake").advise(
        Network,
        "large packets are lost on the path (MTU, VPN), or a firewall inspects the connection",
    )
}

/// Builds the step for a handshake that failed for another reason than the certificate.
pub(super) fn handshake_failed(failure: TlsFailure, message: String) -> Step {
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

/// Builds the step for credentials that the configuration lacks.
pub(super) fn no_credentials(error: &StoreConfigError, scheme: Scheme) -> Step {
    let step = Step::bad(CREDENTIALS, "no_credentials", escape_and_cut(&error.to_string()));
    step.advise(
        Client,
        match scheme {
            Scheme::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a source with \
                 --store-credentials: a file in the form of ~/.aws/credentials, instance, \
                 web-identity, or anonymous for a public bucket"
            }
            Scheme::Gcs => {
                "set GOOGLE_APPLICATION_CREDENTIALS, or name a source with --store-credentials: a \
                 service account's key, instance, or anonymous for a public bucket"
            }
            Scheme::Azure => {
                "set AZURE_STORAGE_KEY, or name a source with --store-credentials: a file with an \
                 account key or a SAS token, instance, web-identity, or anonymous"
            }
            Scheme::Http | Scheme::Https => {
                "--store-credentials names a file that contains \"Bearer TOKEN\" or USER:PASSWORD"
            }
        },
    )
}

/// Builds the step for credentials that can't be obtained from their source.
pub(super) fn credentials_failed(error: &StoreError) -> Step {
    let step = Step::bad(CREDENTIALS, error.kind.label(), escape_and_cut(&error.message));
    match error.kind {
        StoreErrorKind::Unreachable | StoreErrorKind::TimedOut => step
            .advise(Network, "let this machine reach the service that issues the credentials")
            .advise(Client, "or choose another source with --store-credentials"),
        _ => step.advise(
            Client,
            "check the role and its trust policy, the file, or choose another source with \
             --store-credentials",
        ),
    }
}

/// Builds the step about the source of the credentials. The error ends the examination.
pub(super) fn credentials(
    summary: &CredentialsSummary,
    now: SystemTime,
) -> Result<Step, Box<Step>> {
    if summary.is_anonymous {
        return Ok(Step::good(CREDENTIALS, "none: requests are anonymous").detail("source", "none"));
    }
    let source = escape_and_cut(&summary.source);
    let step = Step::good(CREDENTIALS, format!("from {source}")).detail("source", source);
    let Some(expiry) = summary.expiry else {
        return Ok(step.detail("expires", serde_json::Value::Null));
    };
    let time = format_time(expiry);
    let step = step.detail("expires", time.clone());
    let Ok(left) = expiry.duration_since(now) else {
        return Err(Box::new(
            step.problem(Outcome::Bad, "credentials_expired")
                .line(format!("expired at {time}"))
                .advise(Client, "get new ones")
                .advise(Client, "or correct this machine's clock, if it is wrong"),
        ));
    };
    let step = step.line(format!("expire at {time}, in {}", format_validity(left)));
    let is_renewed = summary.source != "the query of the URL";
    Ok(if is_renewed || left > EXPIRY_WARNING {
        step
    } else {
        step.problem(Outcome::Warning, "expires_soon").advise(
            Client,
            "a signed URL can't be renewed: after that time nothing can be read. Use credentials of \
             the store instead",
        )
    })
}

/// Compares the clocks. Returns `None` if the server doesn't send its time.
pub(super) fn clock(head: &ResponseHead, session: &Session) -> Option<Step> {
    let (server, here) = head.clocks()?;
    Some(compare_clocks(server, here, session.credentials.signs_with_clock))
}

fn compare_clocks(server: SystemTime, here: SystemTime, is_signed: bool) -> Step {
    const NAME: &str = "clock";
    let (apart, is_fast) = match here.duration_since(server) {
        Ok(ahead) => (ahead, true),
        Err(behind) => (behind.duration(), false),
    };
    // The server's time has a resolution of one second.
    if apart < Duration::from_secs(2) {
        return Step::good(NAME, "agrees with the server's").detail("seconds", 0);
    }
    let seconds = i64::try_from(apart.as_secs()).unwrap_or(i64::MAX);
    let direction = if is_fast { "ahead of" } else { "behind" };
    let length = if apart < 2 * CLOCK_WARNING {
        format_seconds(apart.as_secs_f64())
    } else {
        format_validity(apart)
    };
    let step = Step::good(NAME, format!("{length} {direction} the server's"))
        .detail("seconds", if is_fast { seconds } else { -seconds });
    let outcome = match apart {
        apart if apart > CLOCK_LIMIT && is_signed => Outcome::Bad,
        apart if apart > CLOCK_WARNING => Outcome::Warning,
        _ => return step,
    };
    let step = step.problem(outcome, "clock_skew").line(format!(
        "here {}, there {}",
        format_time(here),
        format_time(server)
    ));
    step.advise(
        Client,
        "synchronize this machine's clock (timedatectl set-ntp true); stores reject signatures that \
         are more than 15 minutes old or in the future, and renewing credentials fails, too",
    )
    .advise(Server, "or the clock of the server, or of a cache, if that is wrong")
}

/// Builds the step for a request that failed.
pub(super) fn failed(
    name: &'static str,
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let step = Step::bad(name, error.kind.label(), escape_and_cut(&error.message));
    let step = match head {
        Some(head) => step.detail("status", head.status()),
        None => step,
    };
    advise_on(step, error.kind, context)
}

fn advise_on(step: Step, kind: StoreErrorKind, context: &Context) -> Step {
    match kind {
        StoreErrorKind::Denied => denied(step, context),
        StoreErrorKind::CredentialsExpired if context.is_signed_url => {
            step.advise(Client, "create a new signed URL, or use credentials of the store")
        }
        StoreErrorKind::CredentialsExpired => step.advise(
            Client,
            "get new credentials (a session token has a limited lifetime), or choose a source that \
             renews them: web-identity, instance, or a file that something else keeps current",
        ),
        StoreErrorKind::ClockSkew => {
            step.advise(Client, "synchronize this machine's clock (timedatectl set-ntp true)")
        }
        StoreErrorKind::NotFound => step
            .advise(
                Client,
                "check bucket and key in the URL, with upper and lower case; --store-endpoint and \
                 --store-style decide where the bucket is searched for",
            )
            .advise(Server, "or upload the object"),
        StoreErrorKind::Throttled => step
            .advise(Server, "raise its rate limits")
            .advise(Client, "or wait, and use fewer --store-connections"),
        StoreErrorKind::ServerError => step.advise(Server, "check its log"),
        StoreErrorKind::TimedOut => step
            .advise(Server, "it is overloaded or hangs; check its log")
            .advise(Network, "or the path to it loses packets"),
        StoreErrorKind::Unreachable | StoreErrorKind::Interrupted => step
            .advise(Network, "check the path to the server: firewalls, proxies, load balancers")
            .advise(Server, "or check its log"),
        StoreErrorKind::Changed => step.advise(
            Server,
            "objects that are in use must not be replaced: upload new versions under new names",
        ),
        _ => step.advise(Server, "let it, and caches on the way, respond as RFC 9110 says"),
    }
}

fn denied(step: Step, context: &Context) -> Step {
    let step = match (context.scheme, context.is_anonymous) {
        (Scheme::Http | Scheme::Https, true) => step.advise(
            Client,
            "give credentials with --store-credentials FILE (\"Bearer TOKEN\" or USER:PASSWORD), or \
             use a signed URL",
        ),
        (_, true) => step.advise(
            Client,
            "anonymous requests aren't allowed: choose credentials with --store-credentials",
        ),
        (_, false) if context.is_signed_url => {
            step.advise(Client, "sign the URL for GET, with credentials that may read the object")
        }
        _ => step.advise(Client, "check which credentials are used (step \"credentials\")"),
    };
    step.advise(
        Server,
        match context.scheme {
            Scheme::S3 => {
                "or permit s3:GetObject on the object, and s3:ListBucket on the bucket; without the \
                 latter, a missing object is reported as denied, too"
            }
            Scheme::Gcs => "or grant the role Storage Object Viewer on the bucket",
            Scheme::Azure => "or grant the role Storage Blob Data Reader on the container",
            Scheme::Http | Scheme::Https => {
                "or permit it: access rules of the server, permissions of the file and of all folders \
                 above it"
            }
        },
    )
}

/// Builds the step for a folder that can't be listed.
pub(super) fn list_failed(
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let step = failed("list", error, head, context);
    match (error.kind, context.scheme) {
        (StoreErrorKind::Denied, Scheme::S3) => {
            step.advise(Server, "listing a folder takes s3:ListBucket on the bucket")
        }
        (StoreErrorKind::Unsupported, _) => {
            step.advise(Client, "or name each archive instead of the folder")
        }
        _ => step,
    }
}

pub(super) fn listed(objects: &[ListedObject]) -> Step {
    let names: Vec<String> = objects.iter().map(|object| escape_and_cut(&object.name)).collect();
    let shown = names.iter().take(MAX_NAMES).cloned().collect::<Vec<_>>();
    if objects.is_empty() {
        return Step::bad("list", "empty_folder", "no objects in the folder")
            .detail("objects", 0)
            .advise(Client, "check the folder's name; objects in folders below it don't count")
            .advise(Server, "or upload the archives");
    }
    Step::good("list", format!("{} objects: {}", objects.len(), join_first(&names, MAX_NAMES)))
        .detail("objects", objects.len())
        .detail("names", shown)
}

/// Builds the step for an object that can't be used, named after what is wrong with it.
pub(super) fn unreadable(
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let Some(head) = head else { return failed(OBJECT, error, None, context) };
    let found = escape_and_cut(&error.message);
    let has_identity = ["etag", "last-modified"].iter().any(|name| {
        head.header(name).is_some_and(|value| *name != "etag" || !value.starts_with("W/"))
    });
    let step = match head.status() {
        300..=399 => return redirected(found, head),
        status @ 400..=499 if head.header("x-amz-bucket-region").is_some() && status != 404 => {
            match wrong_region(error, head) {
                Some(step) => return step,
                None => return failed(OBJECT, error, Some(head), context),
            }
        }
        200 | 206 if error.kind == StoreErrorKind::Unsupported => match encoding_of(head) {
            Some(encoding) => return compressed(&encoding),
            None if !has_identity => no_identity(found, head),
            None if head.status() == 200 => no_ranges(found),
            None => Step::bad(RANGES, "wrong_range", found).advise(
                Server,
                "the header Content-Range must be that of the requested range; check caches and \
                 proxies on the way",
            ),
        },
        _ => return failed(OBJECT, error, Some(head), context),
    };
    step.detail("status", head.status())
}

fn redirected(found: String, head: &ResponseHead) -> Step {
    let region = head.header("x-amz-bucket-region").map(escape_and_cut);
    if let Some(region) = region {
        return Step::bad(OBJECT, "wrong_region", found)
            .detail("region", region.clone())
            .advise(Client, format!("set --store-region {region}"));
    }
    let step = Step::bad(OBJECT, "redirected", found).detail("status", head.status());
    match head.redirect_host().map(|host| escape_and_cut(&host)) {
        Some(host) => step.detail("host", host.clone()).advise(
            Client,
            format!(
                "redirects aren't followed, since they would lead elsewhere: if you trust {host}, \
                 use it in the URL or in --store-endpoint"
            ),
        ),
        None => step.advise(
            Client,
            "redirects aren't followed: use the URL that it redirects to (curl -I URL shows it)",
        ),
    }
}

/// Returns the step for a region that a signature was made for, but isn't the bucket's.
fn wrong_region(error: &StoreError, head: &ResponseHead) -> Option<Step> {
    error.message.contains("the bucket is in the region").then(|| {
        let region = head.header("x-amz-bucket-region").map(escape_and_cut).unwrap_or_default();
        Step::bad(OBJECT, "wrong_region", escape_and_cut(&error.message))
            .detail("region", region.clone())
            .advise(Client, format!("set --store-region {region}"))
    })
}

fn encoding_of(head: &ResponseHead) -> Option<String> {
    let encoding = head.header("content-encoding")?;
    (!encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity"))
        .then(|| escape_and_cut(encoding))
}

fn compressed(encoding: &str) -> Step {
    Step::bad(ENCODING, "compressed", format!("the response is compressed: {encoding}"))
        .detail("encoding", encoding)
        .advise(
            Server,
            "archives must be sent as they are: switch compression off for them (nginx: gzip off; \
             CDNs: no automatic compression), and don't store them with a Content-Encoding",
        )
}

fn no_identity(found: String, head: &ResponseHead) -> Step {
    Step::bad(IDENTITY, "no_identity", found)
        .detail("weak_etag", head.header("etag").is_some())
        .advise(
            Server,
            "send a strong ETag, or at least Last-Modified (nginx: etag on; Apache: FileETag MTime \
             Size): without them, parts of two versions could be mixed",
        )
}

fn no_ranges(found: String) -> Step {
    Step::bad(RANGES, "no_ranges", found).advise(
        Server,
        "enable range requests for archives (nginx: max_ranges not 0; Apache: MaxRanges), and let \
         caches and proxies pass the header Range",
    )
}

pub(super) fn readable(object: &Response, head: Option<&ResponseHead>) -> Step {
    let length = object.version.length;
    let mut step = Step::good(OBJECT, format!("readable, {length} bytes")).detail("length", length);
    if let Some(head) = head {
        step = step.detail("status", head.status());
        for name in ["server", "via", "x-cache"] {
            if let Some(value) = head.header(name).filter(|value| !value.is_empty()) {
                let value = escape_and_cut(value);
                step = step.line(format!("{name}: {value}")).detail(name, value);
            }
        }
    }
    step
}

/// Builds the step about the encoding of a response that could be used.
pub(super) fn encoding(head: Option<&ResponseHead>) -> Step {
    let step = Step::good(ENCODING, "none, as it should be");
    match head.and_then(|head| head.header("age")).map(escape_and_cut) {
        Some(age) => {
            step.line(format!("from a cache, where it was for {age} s")).detail("age", age)
        }
        None => step,
    }
}

pub(super) fn identity(version: &Version, head: Option<&ResponseHead>) -> Step {
    let step = match (&version.etag, &version.last_modified) {
        (Some(etag), _) => {
            let etag = escape_and_cut(etag);
            Step::good(IDENTITY, format!("ETag {etag}")).detail("etag", etag)
        }
        (None, modified) => {
            let is_weak = head.and_then(|head| head.header("etag")).is_some();
            let (reason, tag) = match is_weak {
                true => ("weak_etag", "only a weak ETag"),
                false => ("no_etag", "no ETag"),
            };
            let modified = modified.as_deref().map(escape_and_cut).unwrap_or_default();
            Step::warning(IDENTITY, reason, format!("{tag}; Last-Modified {modified} is used"))
                .detail("last_modified", modified)
                .advise(
                    Server,
                    "send a strong ETag (nginx: etag on, and gzip off, which weakens it): a \
                     replacement within the same second isn't noticed otherwise",
                )
        }
    };
    match &version.version_id {
        Some(id) => {
            let id = escape_and_cut(id);
            step.line(format!("version {id}")).detail("version", id)
        }
        None => step,
    }
}

/// Builds the step for a range that can't be had, although the first one could.
pub(super) fn range_failed(
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let step = unreadable(error, head, context);
    if step.name == OBJECT { failed(RANGES, error, head, context) } else { step }
}

pub(super) fn no_suffix(step: Step, reason: &str) -> Step {
    step.problem(Outcome::Warning, "no_suffix_ranges")
        .line(format!("not so the last bytes: {}", escape_and_cut(reason)))
        .advise(
            Server,
            "support suffix ranges (Range: bytes=-4096): without them, opening an archive takes one \
             request more",
        )
}

/// Builds the step for a response with another version than the one before.
pub(super) fn unstable_identity(name: &'static str, found: &str) -> Step {
    Step::bad(name, "unstable_identity", found)
        .advise(
            Server,
            "the ETag must be the same in all responses and on all servers behind a load balancer \
             (Apache: FileETag MTime Size, without INode; the same modification times everywhere)",
        )
        .advise(Server, "or the object was replaced just now: try again")
}

/// Builds the step for a condition that isn't met. `status` is that of the response.
pub(super) fn conditions(version: &Version, status: Option<u16>) -> Step {
    let condition = if version.etag.is_some() { "If-Match" } else { "If-Unmodified-Since" };
    let is_honoured = matches!(status, Some(412 | 416));
    let step = match is_honoured {
        true => Step::good(CONDITIONS, format!("{condition} is honoured")),
        false => {
            Step::good(CONDITIONS, format!("{condition} is ignored; the gateway compares versions"))
        }
    };
    step.detail("if_match", is_honoured).detail("status", status)
}

pub(super) fn conditions_failed(error: &StoreError) -> Step {
    let found = format!("a conditional request fails: {}", escape_and_cut(&error.message));
    Step::bad(CONDITIONS, "condition_failed", found)
        .advise(Server, "let it, and proxies on the way, accept the header If-Match with GET")
}

/// Adds that the version could be confirmed. `status` is that of the response.
pub(super) fn revalidated(step: Step, status: Option<u16>) -> Step {
    let is_honoured = status == Some(304);
    let line = match is_honoured {
        true => "so is If-None-Match (status 304)",
        false => "HEAD shows the version",
    };
    step.line(line).detail("if_none_match", is_honoured)
}

pub(super) fn not_revalidated(step: Step, error: &StoreError) -> Step {
    step.problem(Outcome::Warning, "no_revalidation")
        .line(format!("HEAD fails: {}", escape_and_cut(&error.message)))
        .advise(Server, "permit HEAD: without it, replaced archives aren't noticed")
}

pub(super) fn not_an_archive(kind: &ErrorKind, start: &[u8]) -> Step {
    let step = Step::bad("header", kind.label(), escape_and_cut(&kind.to_string()));
    let is_page = start.trim_ascii_start().starts_with(b"<");
    match kind {
        ErrorKind::NotHexz if is_page => step
            .line("it is a page of text, in HTML or XML")
            .advise(Client, "use the URL of the archive itself, not of a page about it"),
        ErrorKind::NotHexz => step.advise(Client, "give the URL of a Hexz archive"),
        _ => step.advise(Server, "upload the archive again; \"hexz-nbd verify\" checks the file"),
    }
}

pub(super) fn header(parents: usize) -> Step {
    let found = match parents {
        0 => "a Hexz archive without parents".to_owned(),
        1 => "a Hexz archive with a parent".to_owned(),
        more => format!("a Hexz archive with {more} parents"),
    };
    Step::good("header", found).detail("parents", parents)
}

/// Builds the step about parents: names, with what is wrong with them. The names may be those of the
/// first `count` ones.
pub(super) fn parents(found: &[(String, Option<String>)], count: usize) -> Step {
    const NAME: &str = "parents";
    let missing = found.iter().filter(|(_, problem)| problem.is_some()).count();
    let step = match missing {
        0 => Step::good(NAME, format!("{} of {count} looked for, all found", found.len())),
        _ => Step::warning(
            NAME,
            "parent_not_beside",
            format!("{missing} of {} can't be read beside the archive", found.len()),
        )
        .advise(Server, "upload the parents into the archive's folder, under these names")
        .advise(Client, "or name the folder that has them with --parent-dir URL"),
    };
    let names: Vec<&str> = found.iter().map(|(name, _)| &**name).collect();
    let step = step.detail("names", names);
    found.iter().fold(step, |step, (name, problem)| match problem {
        None => step.line(format!("{name}: found")),
        Some(problem) => step.line(format!("{name}: {problem}")),
    })
}

pub(super) fn no_tree(error: &StoreError, is_absent: bool) -> Step {
    if is_absent {
        return Step::good("tree file", "none; only --digest needs one")
            .line("with --digest, the archive is read as a whole when it is opened (hexz-nbd tree)")
            .detail("found", false);
    }
    let found = format!("can't be read: {}", escape_and_cut(&error.message));
    Step::warning("tree file", "tree_unreadable", found)
        .advise(Server, "with --digest, archives are read as a whole without it: make it readable")
}

pub(super) fn wrong_tree(found: &str) -> Step {
    Step::warning("tree file", "wrong_tree", format!("not that of this archive: {found}")).advise(
        Server,
        "create it with \"hexz-nbd tree\" again, and upload it with the archive: with --digest, the \
         archive is read as a whole otherwise",
    )
}

/// Builds the step about small reads, with their times in ascending order.
pub(super) fn latency(times: &[Duration], median: Duration) -> Step {
    let format =
        |time: Option<&Duration>| format_seconds(time.copied().unwrap_or_default().as_secs_f64());
    let found = format!(
        "median {}, from {} to {}, of {} small reads",
        format(Some(&median)),
        format(times.first()),
        format(times.last()),
        times.len()
    );
    let step = Step::good("latency", found).detail("median_seconds", median.as_secs_f64());
    if median < HIGH_LATENCY {
        return step;
    }
    step.problem(Outcome::Warning, "high_latency")
        .advise(Network, "run the gateway nearer to the store: in the same region or data centre")
        .advise(
            Client,
            "or give the gateway more memory (--cache-size), so that it asks less often",
        )
}

pub(super) fn rate(bytes: u64, took: Duration, latency: Duration) -> Step {
    let rate = mebibytes_per_second(bytes, took);
    let megabytes = LARGE_READ / (1024 * 1024);
    let found = format!(
        "{rate:.0} MiB/s, {bytes} bytes in {}, {IN_FLIGHT} requests of {megabytes} MiB at a time",
        format_seconds(took.as_secs_f64())
    );
    let step = Step::good("rate", found)
        .detail("bytes", bytes)
        .detail("seconds", took.as_secs_f64())
        .detail("in_flight", IN_FLIGHT);
    if bytes < LARGE_READ {
        return step.line("that is too little data to tell the rate");
    }
    let random = latency.as_secs_f64() + 1.0 / rate.max(1e-6);
    let step = step.detail("random_read_seconds", random).line(format!(
        "a random read of data that isn't in memory takes about {}",
        format_seconds(random)
    ));
    if rate >= LOW_RATE {
        return step;
    }
    step.problem(Outcome::Warning, "low_rate")
        .advise(Network, "check the path to the store: bandwidth, proxies, the region")
        .advise(Server, "or its limits on the rate, for each connection or in all")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000 + seconds)
    }

    #[test]
    fn clocks_are_compared_by_what_stores_accept() {
        for (server, here, is_signed, outcome, seconds) in [
            (0, 1, true, Outcome::Good, 0),
            (0, 30, true, Outcome::Good, 30),
            (120, 0, true, Outcome::Warning, -120),
            (0, 901, true, Outcome::Bad, 901),
            (0, 901, false, Outcome::Warning, 901),
        ] {
            let step = compare_clocks(at(server), at(here), is_signed);
            assert_eq!((step.outcome, step.details["seconds"].as_i64()), (outcome, Some(seconds)));
        }
    }

    #[test]
    fn expiry_of_credentials_is_reported() {
        let summary = |source: &str, expiry| CredentialsSummary {
            source: source.to_owned(),
            is_anonymous: false,
            signs_with_clock: true,
            expiry,
        };
        let now = at(0);
        let query = "the query of the URL";
        let soon = credentials(&summary(query, Some(now + HOUR)), now).unwrap();
        assert_eq!(soon.reasons, ["expires_soon"]);
        let renewed = credentials(&summary("elsewhere", Some(now + HOUR)), now).unwrap();
        assert_eq!((renewed.outcome, renewed.lines.len()), (Outcome::Good, 1));
        let expired = credentials(&summary(query, Some(now - HOUR)), now).unwrap_err();
        assert_eq!(expired.reasons, ["credentials_expired"]);
        assert_eq!(credentials(&summary("a file", None), now).unwrap().outcome, Outcome::Good);
    }

    #[test]
    fn permissions_are_named_by_the_kind_of_store() {
        let error = StoreError {
            kind: StoreErrorKind::Denied,
            message: "status 403".to_owned(),
            retry_after: None,
        };
        for (scheme, word) in [
            (Scheme::S3, "s3:GetObject"),
            (Scheme::Gcs, "Storage Object Viewer"),
            (Scheme::Azure, "Storage Blob Data Reader"),
            (Scheme::Https, "permissions of the file"),
        ] {
            for (is_anonymous, is_signed_url) in [(true, false), (false, true), (false, false)] {
                let context = Context { scheme, is_anonymous, is_signed_url };
                let step = failed(OBJECT, &error, None, &context);
                let sides: Vec<_> = step.advice.iter().map(|it| it.side).collect();
                assert_eq!(sides, [Client, Server]);
                assert!(step.advice[1].text.contains(word), "{:?}", step.advice);
            }
        }
    }
}
