//! Stores: their configuration, and implementations of [`Store`](crate::Store).

mod aws;
mod canned;
mod cloud;
mod connector;
mod credentials;
mod environment;
mod index;
mod plain;
mod probe;
mod profile;
mod secret;
mod service;
mod tokens;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::dial::{Dial, DirectDialer};
use crate::http::{ProxyChoice, Timeouts};
use crate::response::RawResponse;
use crate::store::{ByteRange, StoreError, StoreErrorKind};

#[doc(hidden)]
pub use canned::parse_xml_listing;
pub use credentials::{CredentialSource, CredentialsSummary};
pub use environment::Environment;
#[doc(hidden)]
pub use index::{parse_html_index, parse_json_index};
pub use probe::{ObservedStore, StoreProbe};
pub use secret::Secret;

/// Maximum size of a listing, or of a page of it, in bytes.
const MAX_LISTING: usize = 8 * 1024 * 1024;
/// Maximum size of a range, in bytes.
const MAX_RANGE: u64 = 256 * 1024 * 1024;

/// How the bucket of an S3 store appears in URLs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum S3Style {
    /// In the path if an endpoint is given or the name contains dots, else in the host.
    #[default]
    Auto,
    /// `https://ENDPOINT/BUCKET/KEY`.
    Path,
    /// `https://BUCKET.ENDPOINT/KEY`.
    VirtualHost,
}

/// Configuration of stores. `Debug` shows no secrets.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// URL of the service for S3, Google Cloud and Azure, without the bucket: `https://HOST[:PORT]`.
    /// If there is none, that of S3 comes from `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, and else
    /// it is the vendor's.
    pub endpoint: Option<String>,
    /// Region of an S3 bucket. If there is none, it comes from `AWS_REGION`, `AWS_DEFAULT_REGION`
    /// or the AWS profile, and is `us-east-1` otherwise.
    pub region: Option<String>,
    /// Place of the bucket in S3 URLs.
    pub style: S3Style,
    /// Azure storage account; from `AZURE_STORAGE_ACCOUNT` if there is none.
    pub account: Option<String>,
    /// PEM file with the CAs to trust *instead of* the system's, as for curl. It applies to all
    /// servers: the store and the services that issue credentials.
    pub ca_file: Option<PathBuf>,
    /// Proxy.
    pub proxy: ProxyChoice,
    /// Source of the credentials.
    pub credentials: CredentialSource,
    /// True to allow plain HTTP to other hosts than this one.
    pub allow_insecure: bool,
    /// Limits on time.
    pub timeouts: Timeouts,
    /// Time after which failures to connect to a server are final, if there was no connection to it
    /// before: [`StoreErrorKind::NeverReached`]. For programs whose user waits, since the name or
    /// the port is probably wrong. `None` if the server may be down for a while.
    pub connect_patience: Option<Duration>,
    /// Value of the header `User-Agent`.
    pub user_agent: String,
    /// Opens connections.
    pub dialer: Arc<dyn Dial>,
    /// Environment variables, from which proxies and credentials are read.
    pub environment: Environment,
}

impl Default for StoreConfig {
    /// Returns the configuration of a public endpoint, with the environment of this process.
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            style: S3Style::default(),
            account: None,
            ca_file: None,
            proxy: ProxyChoice::default(),
            credentials: CredentialSource::default(),
            allow_insecure: false,
            timeouts: Timeouts::default(),
            connect_patience: None,
            user_agent: concat!("object-reader/", env!("CARGO_PKG_VERSION")).to_owned(),
            dialer: Arc::new(DirectDialer),
            environment: Environment::from_process(),
        }
    }
}

/// Reason why a store can't be used as configured. It contains no secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StoreConfigError(String);

impl From<String> for StoreConfigError {
    fn from(message: String) -> Self {
        Self(message)
    }
}

/// Returns the maximum length of a response to a request for `range`.
fn range_limit(range: &ByteRange) -> Result<usize, StoreError> {
    let length = match range {
        ByteRange::Bounded(range) => range.end.saturating_sub(range.start),
        ByteRange::Suffix(length) => *length,
    };
    match usize::try_from(length) {
        Ok(limit) if (1..=MAX_RANGE).contains(&length) => Ok(limit),
        _ => Err(StoreError::new(
            StoreErrorKind::Unsupported,
            format!("a range of {length} bytes can't be requested, only of 1 to {MAX_RANGE}"),
        )),
    }
}

/// Returns true if a server's response to HEAD doesn't say whether GET would succeed.
fn head_was_refused(raw: &RawResponse) -> bool {
    matches!(raw.status.as_u16(), 400 | 401 | 403 | 405 | 501)
}
