//! Options for archives in object stores and on HTTP servers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use hexz_exports::TracePlace;
use hexz_reader::storage::is_url;
use object_reader::DiskCache;
use serde::Deserialize;

use crate::cli::values::{MAX_COUNT, count, duration, os_text, size};
use crate::cli::{from_file, location};

const MIN_FETCH: u64 = 256 * 1024;
const MAX_FETCH: u64 = 16 * 1024 * 1024;

/// Options for archives whose paths are URLs, common to several commands.
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[command(next_help_heading = "Object stores")]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct StoreOptions {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) store: StoreSettings,
    /// Time that a read waits for a store that is down or slow, before it fails
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    pub(crate) store_timeout: Duration,
    /// Maximum number of connections to each store
    #[arg(long, value_name = "N", default_value = "64", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    pub(crate) store_connections: usize,
    /// Size of the requests for random reads, from 256 KiB to 16 MiB. Sequential reads use larger
    /// requests
    #[arg(
        long, value_name = "SIZE", default_value = "1MiB",
        value_parser = size::<MIN_FETCH, MAX_FETCH>
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, MIN_FETCH, MAX_FETCH>")]
    pub(crate) fetch_size: ByteSize,
    /// Time for which an object is believed to be unchanged; after it, a client that opens an
    /// export causes a conditional request
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    pub(crate) fresh_for: Duration,
    /// Options of single stores, by their URLs.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) tables: BTreeMap<String, StoreSettings>,
    /// URLs with queries, which are removed from the paths of archives.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) secret_urls: SecretUrls,
}

/// Options of the cache that survives restarts.
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[command(next_help_heading = "Object stores")]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct DiskCacheOptions {
    /// Keep parts of remote archives in this folder, as the store sends them, across restarts. Only
    /// one process can use it
    #[arg(long, value_name = "DIR")]
    pub(crate) disk_cache: Option<PathBuf>,
    /// Size of the disk cache, which is reserved at the start
    #[arg(
        long, value_name = "SIZE", default_value = "10GiB",
        value_parser = size::<{ DiskCache::MIN_SIZE }, { u64::MAX }>
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, { DiskCache::MIN_SIZE }, { u64::MAX }>")]
    pub(crate) disk_cache_size: ByteSize,
}

/// Options for fetching parts of remote archives in advance.
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[command(next_help_heading = "Object stores")]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct TraceOptions {
    /// Where the traces of remote archives are, which name what to fetch when an archive is opened:
    /// "auto" for NAME.trace beside the archive NAME, a folder or URL that has NAME.trace, or "off".
    /// "hexz-nbd trace" records them
    #[arg(long, value_name = "auto|off|DIR|URL", value_parser = os_text(location::folder))]
    #[serde(deserialize_with = "from_file::folder")]
    pub(crate) traces: Option<PathBuf>,
    /// Maximum number of bytes per second that are fetched for traces, behind what clients read
    #[arg(
        long, value_name = "SIZE", default_value = "128MiB", value_parser = size::<MIN_FETCH, { u64::MAX }>
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, MIN_FETCH, { u64::MAX }>")]
    pub(crate) prefetch_rate: ByteSize,
}

impl TraceOptions {
    /// Returns the place of traces; `None` if they aren't used.
    pub(crate) fn place(&self) -> Option<TracePlace> {
        match self.traces.as_deref() {
            Some(off) if off == "off" => None,
            Some(auto) if auto == "auto" => Some(TracePlace::Beside),
            None => Some(TracePlace::Beside),
            Some(folder) => Some(TracePlace::Folder(folder.to_owned())),
        }
    }

    /// Returns the folder or URL of traces, if they aren't beside their archives.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        match self.place() {
            Some(TracePlace::Folder(folder)) => Some(folder),
            Some(TracePlace::Beside) | None => None,
        }
    }
}

/// State of archives from which on the server is ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReadyWhen {
    /// The archives are open
    #[default]
    Opened,
    /// What the traces of the archives name has been fetched, or can't be
    Warm,
}

/// Options that can differ between stores.
#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct StoreSettings {
    /// URL of an S3-compatible service, or another endpoint for Google Cloud or Azure: such as
    /// https://minio.example.org:9000
    #[arg(long, value_name = "URL")]
    pub(crate) store_endpoint: Option<String>,
    /// Region of the S3 bucket [default: from AWS_REGION or the AWS profile, else us-east-1]
    #[arg(long, value_name = "REGION")]
    pub(crate) store_region: Option<String>,
    /// Where S3 URLs have the name of the bucket
    #[arg(long, value_enum, value_name = "STYLE", default_value_t)]
    #[serde(deserialize_with = "from_file::choice")]
    pub(crate) store_style: StoreStyle,
    /// Account of Azure Blob Storage [default: from AZURE_STORAGE_ACCOUNT]
    #[arg(long, value_name = "NAME")]
    pub(crate) store_account: Option<String>,
    /// PEM file with the CAs of the store's certificate, instead of the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) store_ca: Option<PathBuf>,
    /// HTTP proxy, or "none" [default: from HTTPS_PROXY, HTTP_PROXY and NO_PROXY]
    #[arg(long, value_name = "URL|none")]
    pub(crate) store_proxy: Option<String>,
    /// Source of the credentials: auto, env, instance, web-identity, anonymous, or a file.
    ///
    /// "auto" tries environment variables, a web identity token, the AWS profile and the
    /// container's credential service, or what the vendor's tools use, but not instance metadata.
    /// "instance" uses only that. A file has the form of the AWS credentials file, of a Google
    /// service account key, or contains an Azure account key or SAS token; for HTTP servers, it
    /// contains a bearer token or USER:PASSWORD.
    #[arg(long, value_name = "SOURCE|FILE")]
    pub(crate) store_credentials: Option<String>,
    /// Allow plain HTTP to other machines: others can read and change what is transferred
    #[arg(long)]
    pub(crate) store_insecure: bool,
}

/// Options of `hexz-nbd doctor` for stores.
#[derive(Debug, Default, Args)]
#[command(mut_group("StoreSettings", |settings| settings.conflicts_with("server")))]
pub(crate) struct StoreToCheck {
    /// Check an object store or an HTTP server instead: URL of an archive, or of a folder, which ends
    /// in a slash
    #[arg(
        long, value_name = "URL", help_heading = "Object stores",
        conflicts_with_all = [
            "server", "export", "tls_ca", "tls_cert", "tls_key", "tls_dir", "tls_hostname", "no_tls",
            "require_tls",
        ]
    )]
    pub(crate) store: Option<SecretUrl>,
    #[command(flatten, next_help_heading = "Object stores")]
    pub(crate) settings: StoreSettings,
}

/// A URL whose query may be a secret. `Debug` shows nothing of it.
#[derive(Clone)]
pub(crate) struct SecretUrl(pub(crate) String);

impl From<&str> for SecretUrl {
    fn from(url: &str) -> Self {
        Self(url.to_owned())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretUrl(..)")
    }
}

/// Place of the bucket's name in S3 URLs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoreStyle {
    /// In the path if --store-endpoint is set, else in the host
    #[default]
    Auto,
    /// `https://ENDPOINT/BUCKET/KEY`
    Path,
    /// `https://BUCKET.ENDPOINT/KEY`
    Virtual,
}

/// URLs with their queries. `Debug` doesn't show them.
#[derive(Clone, Default)]
pub(crate) struct SecretUrls(Vec<String>);

impl SecretUrls {
    /// Removes the queries of those paths of archives and folders that are URLs.
    pub(crate) fn take_from<'a>(
        archives: impl IntoIterator<Item = &'a mut PathBuf>,
        folders: impl IntoIterator<Item = &'a mut PathBuf>,
    ) -> Self {
        let archives = archives.into_iter().filter_map(|path| take_query(path, false));
        let folders = folders.into_iter().filter_map(|path| take_query(path, true));
        Self(archives.chain(folders).collect())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// Removes the query of a path that is a URL, and returns the whole URL. That of a folder then ends
/// in a slash.
fn take_query(path: &mut PathBuf, is_folder: bool) -> Option<String> {
    let (url, query) = path.to_str().filter(|_| is_url(path))?.split_once('?')?;
    let slash = if is_folder && !url.ends_with('/') { "/" } else { "" };
    let whole = format!("{url}{slash}?{query}");
    *path = format!("{url}{slash}").into();
    Some(whole)
}

impl fmt::Debug for SecretUrls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretUrls({})", self.0.len())
    }
}
