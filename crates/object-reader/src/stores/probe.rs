//! Examination of a store step by step, for diagnostics.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use percent_encoding::percent_decode_str;
use tokio::io::{AsyncRead, AsyncWrite};

use super::credentials::{Credentials, CredentialsSummary};
use super::{StoreConfig, StoreConfigError};
use crate::http::{HttpProbe, ResponseHead, ResponseObserver, TlsHandshake};
use crate::store::{Store, StoreError};
use crate::url::StoreUrl;

impl StoreConfig {
    /// Returns a store to be examined. Sends no requests, but reads the file with CAs.
    ///
    /// # Errors
    /// The configuration is invalid, or the file with CAs is missing or unusable.
    pub fn probe(&self, url: &StoreUrl) -> Result<StoreProbe, StoreConfigError> {
        let http = self.http_probe(url)?;
        Ok(StoreProbe { config: self.clone(), url: url.clone(), http })
    }
}

/// A store that is examined step by step. The steps before [`open`](Self::open) are those that
/// every connection of a [`Store`] takes; the caller connects.
#[derive(Debug)]
pub struct StoreProbe {
    config: StoreConfig,
    url: StoreUrl,
    http: HttpProbe,
}

impl StoreProbe {
    /// Returns the server's host, without brackets, and its port.
    pub fn server(&self) -> (&str, u16) {
        self.http.server()
    }

    /// Returns the host and port of the proxy to connect to instead of the server, if there is one.
    pub fn proxy(&self) -> Option<(&str, u16)> {
        self.http.proxy()
    }

    /// Returns true if the server uses TLS.
    pub fn is_https(&self) -> bool {
        self.http.is_https()
    }

    /// Returns true if requests would leave this machine without TLS.
    pub fn is_insecure(&self) -> bool {
        self.http.is_insecure()
    }

    /// Asks the proxy on the other end of `stream` for a tunnel to a server that uses TLS.
    ///
    /// # Errors
    /// The proxy refuses, or isn't one.
    pub async fn open_tunnel<S>(&self, stream: &mut S) -> Result<(), StoreError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.http.open_tunnel(stream).await
    }

    /// Performs the TLS handshake, and closes the connection.
    pub async fn handshake<S>(&self, stream: S) -> TlsHandshake
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.http.handshake(stream).await
    }

    /// Opens the store, as [`StoreConfig::open`] does.
    ///
    /// # Errors
    /// Those of [`StoreConfig::open`].
    pub fn open(&self) -> Result<ObservedStore, StoreConfigError> {
        let observer = ResponseObserver::default();
        let (store, credentials) = self.config.open_observed(&self.url, Some(observer.clone()))?;
        Ok(ObservedStore { url: self.url.clone(), store, credentials, observer })
    }
}

/// A store whose responses can be looked at.
#[derive(Clone)]
pub struct ObservedStore {
    url: StoreUrl,
    store: Arc<dyn Store>,
    credentials: Arc<Credentials>,
    observer: ResponseObserver,
}

impl fmt::Debug for ObservedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObservedStore").field("store", &self.store).finish_non_exhaustive()
    }
}

impl ObservedStore {
    /// Returns the store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Obtains the credentials, and describes them. A signature in the URL counts.
    ///
    /// # Errors
    /// The credentials can't be obtained.
    pub async fn credentials(&self) -> Result<CredentialsSummary, StoreError> {
        let summary = self.credentials.summary().await;
        self.observer.take();
        match self.url.query() {
            Some(query) => Ok(CredentialsSummary {
                source: "the query of the URL".to_owned(),
                is_anonymous: false,
                expiry: presigned_expiry(query.expose()),
                ..summary?
            }),
            None => summary,
        }
    }

    /// Takes the head of the response to the latest request. Returns `None` if there was none.
    pub fn take_response(&self) -> Option<ResponseHead> {
        self.observer.take()
    }
}

/// Returns the time at which a signature in a URL's query expires: of S3, Google Cloud and Azure.
fn presigned_expiry(query: &str) -> Option<SystemTime> {
    let value = |name: &str| {
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            key.eq_ignore_ascii_case(name).then(|| percent_decode_str(value).decode_utf8_lossy())
        })
    };
    for (date, lifetime) in [("X-Amz-Date", "X-Amz-Expires"), ("X-Goog-Date", "X-Goog-Expires")] {
        if let (Some(date), Some(lifetime)) = (value(date), value(lifetime)) {
            let lifetime = Duration::from_secs(lifetime.parse().ok()?);
            return parse_basic_time(&date)?.checked_add(lifetime);
        }
    }
    humantime::parse_rfc3339_weak(&value("se")?).ok()
}

/// Parses a time in the basic format of ISO 8601, such as `20261130T041600Z`.
fn parse_basic_time(text: &str) -> Option<SystemTime> {
    let part = |from: usize, to: usize| text.get(from..to);
    let (date, clock) = (
        format!("{}-{}-{}", part(0, 4)?, part(4, 6)?, part(6, 8)?),
        format!("{}:{}:{}", part(9, 11)?, part(11, 13)?, part(13, 15)?),
    );
    humantime::parse_rfc3339(&format!("{date}T{clock}Z")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiry_of_signed_urls_is_found() {
        let expiry = |query: &str| {
            presigned_expiry(query).map(|it| humantime::format_rfc3339_seconds(it).to_string())
        };
        let amazon = "X-Amz-Date=20261130T041600Z&X-Amz-Expires=3600&X-Amz-Signature=s3cret";
        assert_eq!(expiry(amazon).as_deref(), Some("2026-11-30T05:16:00Z"));
        let azure = "sv=2024-11-04&se=2026-11-30T05%3A16%3A00Z&sig=s3cret";
        assert_eq!(expiry(azure).as_deref(), Some("2026-11-30T05:16:00Z"));
        for none in ["", "a=b", "se=never", "X-Amz-Date=2026&X-Amz-Expires=1", "X-Amz-Date=é"] {
            assert_eq!(expiry(none), None, "{none}");
        }
    }
}
