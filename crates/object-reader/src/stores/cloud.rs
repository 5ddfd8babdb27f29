//! S3, Google Cloud Storage and Azure Blob Storage. object_store builds and signs the requests.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use object_store::aws::AwsCredential;
use object_store::azure::{AzureAccessKey, AzureCredential, split_sas};
use object_store::client::CredentialProvider;
use object_store::gcp::GcpCredential;
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore};

use super::connector::Capture;
use super::credentials::{Credential, Credentials, Loaded};
use super::{MAX_LISTING, head_was_refused, range_limit};
use crate::http::Streaming;
use crate::listing::ListingPage;
use crate::response::{RawResponse, check_current, check_failure, check_get};
use crate::store::{
    ByteRange, GetRequest, ListedObject, ReceiveBytes, Response, Store, StoreError, StoreErrorKind,
    Version,
};
use crate::url::{Scheme, check_key};

/// A client of object_store.
pub(super) trait CloudApi: ObjectStore + PaginatedListStore {}

impl<T: ObjectStore + PaginatedListStore> CloudApi for T {}

/// A bucket or container.
pub(super) struct CloudStore {
    pub(super) label: String,
    pub(super) api: Arc<dyn CloudApi>,
    pub(super) credentials: Arc<Credentials>,
    pub(super) scheme: Scheme,
    /// Set if reading a particular version isn't permitted, which is a permission of its own.
    pub(super) lacks_versions: AtomicBool,
}

impl fmt::Debug for CloudStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudStore").field("label", &self.label).finish_non_exhaustive()
    }
}

impl CloudStore {
    /// Sends a request for an object. Renews rejected credentials once.
    async fn request(
        &self,
        key: &str,
        options: &GetOptions,
        (limit, bypass_caches): (usize, bool),
        streaming: Option<&Streaming>,
    ) -> Result<RawResponse, StoreError> {
        let path = match Path::parse(key) {
            Ok(path) if path.as_ref() == key && !key.is_empty() => path,
            _ => return Err(unsupported("the key can't be that of an object")),
        };
        let attempt = |_: Arc<Loaded>| {
            let capture = Capture::of_object(limit, bypass_caches, streaming.cloned());
            let mut options = options.clone();
            options.extensions.insert(capture.clone());
            let path = &path;
            async move {
                let result = self.api.get_opts(path, options).await;
                capture.take().unwrap_or_else(|| Err(not_sent(result.err())))
            }
        };
        self.credentials.send_renewing(attempt).await
    }

    async fn get_range(
        &self,
        key: &str,
        request: &GetRequest,
        streaming: Option<&Streaming>,
    ) -> Result<Response, StoreError> {
        let limit = (range_limit(&request.range)?, request.bypass_caches);
        let pinned = request.version.as_ref();
        let mut options = GetOptions {
            range: Some(match &request.range {
                ByteRange::Bounded(range) => GetRange::Bounded(range.clone()),
                ByteRange::Suffix(length) => GetRange::Suffix(*length),
            }),
            if_match: pinned.and_then(|version| version.etag.clone()),
            version: pinned.and_then(|version| version.version_id.clone()),
            ..GetOptions::default()
        };
        if self.lacks_versions.load(Ordering::Relaxed) {
            options.version = None;
        }
        let mut raw = self.request(key, &options, limit, streaming).await?;
        if raw.status.as_u16() == 403 && options.version.take().is_some() {
            let without = self.request(key, &options, limit, streaming).await?;
            if without.status.as_u16() != 403 {
                self.lacks_versions.store(true, Ordering::Relaxed);
                tracing::info!(
                    store = self.label,
                    "no permission to read versions (s3:GetObjectVersion): ETags are compared instead"
                );
                raw = without;
            }
        }
        check_get(&raw, request, SystemTime::now())
    }

    /// Reads a suffix as a range, once the length is known.
    async fn get_suffix(
        &self,
        key: &str,
        request: &GetRequest,
        length: u64,
    ) -> Result<Response, StoreError> {
        let version = match &request.version {
            Some(version) => version.clone(),
            None => {
                let first = GetRequest { range: ByteRange::Bounded(0..1), ..request.clone() };
                let first = self.get_range(key, &first, None).await?;
                if first.version.length == 0 {
                    return Ok(first);
                }
                first.version
            }
        };
        let range = version.length.saturating_sub(length)..version.length;
        let second = GetRequest {
            range: ByteRange::Bounded(range),
            version: Some(version),
            bypass_caches: request.bypass_caches,
        };
        let mut result = self.get_range(key, &second, None).await;
        if let (None, Err(error)) = (&request.version, &mut result)
            && error.kind == StoreErrorKind::Changed
        {
            // The caller didn't ask for a version; the next attempt finds the new one.
            error.kind = StoreErrorKind::Interrupted;
        }
        result
    }

    async fn list_objects(
        &self,
        prefix: &str,
        page_token: Option<String>,
    ) -> Result<ListingPage, StoreError> {
        let result = self.list_once(prefix, page_token).await?;
        let mut objects = Vec::new();
        for object in result.result.objects {
            let name = object.location.as_ref().strip_prefix(prefix).unwrap_or("");
            if name.is_empty() || name.contains('/') || check_key(name).is_err() {
                continue;
            }
            // Listings of Azure, unlike its headers, have tags without quotes.
            let lacks_quotes = |tag: &str| self.scheme != Scheme::S3 && !tag.starts_with('"');
            let quote = |tag: String| match lacks_quotes(&tag) {
                true => format!("\"{tag}\""),
                false => tag,
            };
            let version = object.e_tag.map(|tag| Version {
                length: object.size,
                etag: Some(quote(tag)),
                version_id: None,
                last_modified: None,
            });
            objects.push(ListedObject { name: name.to_owned(), version });
        }
        Ok(ListingPage { objects, next: result.page_token })
    }

    async fn list_once(
        &self,
        prefix: &str,
        page_token: Option<String>,
    ) -> Result<object_store::list::PaginatedListResult, StoreError> {
        let page = parking_lot::Mutex::new(None);
        let attempt = |_: Arc<Loaded>| {
            let capture = Capture::of_listing(MAX_LISTING);
            let mut options = PaginatedListOptions {
                delimiter: Some(Cow::Borrowed("/")),
                page_token: page_token.clone(),
                ..PaginatedListOptions::default()
            };
            options.extensions.insert(capture.clone());
            let page = &page;
            let prefix = Some(prefix).filter(|prefix| !prefix.is_empty());
            async move {
                let result = self.api.list_paginated(prefix, options).await;
                if let Some(response) = capture.take() {
                    return response;
                }
                *page.lock() = Some(result.map_err(|_| {
                    unsupported(
                        "the listing can't be used: its XML isn't valid, or a key has an empty \
                         component or one that is . or ..",
                    )
                })?);
                Ok(RawResponse::default())
            }
        };
        let raw = self.credentials.send_renewing(attempt).await?;
        if let Some(page) = page.into_inner() {
            return Ok(page);
        }
        Err(match raw.is_truncated && raw.status.is_success() {
            true => {
                unsupported(format!("a page of the listing is longer than {MAX_LISTING} bytes"))
            }
            false => check_failure(&raw, false, SystemTime::now()),
        })
    }
}

fn unsupported(message: impl Into<String>) -> StoreError {
    StoreError::new(StoreErrorKind::Unsupported, message)
}

/// Describes why object_store sent no request. Its words may contain a URL, so they aren't used.
fn not_sent(error: Option<object_store::Error>) -> StoreError {
    let mut source = error.as_ref().and_then(std::error::Error::source);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<StoreError>() {
            return error.clone();
        }
        source = error.source();
    }
    unsupported("no request for this key can be made")
}

impl Store for CloudStore {
    fn label(&self) -> &str {
        &self.label
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        request: &'a GetRequest,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        async move {
            match request.range {
                // Azure has no suffix ranges.
                ByteRange::Suffix(length) if self.scheme == Scheme::Azure && length > 0 => {
                    self.get_suffix(key, request, length).await
                }
                _ => self.get_range(key, request, None).await,
            }
        }
        .boxed()
    }

    fn get_streaming<'a>(
        &'a self,
        key: &'a str,
        request: &'a GetRequest,
        receiver: Arc<dyn ReceiveBytes>,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        match request.range {
            ByteRange::Suffix(_) => self.get(key, request),
            ByteRange::Bounded(_) => async move {
                let streaming = Streaming::new(request, &receiver);
                self.get_range(key, request, Some(&streaming)).await
            }
            .boxed(),
        }
    }

    fn is_current<'a>(
        &'a self,
        key: &'a str,
        version: &'a Version,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        async move {
            let mut options = GetOptions {
                head: true,
                if_none_match: version.etag.clone(),
                ..GetOptions::default()
            };
            let mut raw = self.request(key, &options, (0, false), None).await?;
            if head_was_refused(&raw) {
                // A response to GET has a body that says why.
                options.head = false;
                options.range = Some(GetRange::Bounded(0..1));
                raw = self.request(key, &options, (1, false), None).await?;
            }
            check_current(&raw, version, SystemTime::now())
        }
        .boxed()
    }

    fn list_page<'a>(
        &'a self,
        prefix: &'a str,
        page: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ListingPage, StoreError>> {
        self.list_objects(prefix, page.map(str::to_owned)).boxed()
    }

    fn credentials_expiry(&self) -> Option<SystemTime> {
        self.credentials.expiry()
    }
}

/// Gives object_store the credentials for signing.
#[derive(Debug)]
pub(super) struct Provider(pub(super) Arc<Credentials>);

impl Provider {
    async fn load(&self) -> object_store::Result<Arc<Loaded>> {
        self.0.get().await.map_err(generic)
    }
}

fn generic(error: StoreError) -> object_store::Error {
    object_store::Error::Generic { store: "credentials", source: Box::new(error) }
}

fn wrong_kind() -> object_store::Error {
    generic(StoreError::new(StoreErrorKind::Denied, "the credentials are of the wrong kind"))
}

/// [`Provider`] for S3.
#[derive(Debug)]
pub(super) struct AwsProvider(pub(super) Provider);

#[async_trait]
impl CredentialProvider for AwsProvider {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        match &self.0.load().await?.credential {
            Credential::Aws { key_id, secret_key, session_token } => Ok(Arc::new(AwsCredential {
                key_id: key_id.clone(),
                secret_key: secret_key.expose().to_owned(),
                token: session_token.as_ref().map(|token| token.expose().to_owned()),
            })),
            _ => Err(wrong_kind()),
        }
    }
}

/// [`Provider`] for Google Cloud Storage.
#[derive(Debug)]
pub(super) struct GoogleProvider(pub(super) Provider);

#[async_trait]
impl CredentialProvider for GoogleProvider {
    type Credential = GcpCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<GcpCredential>> {
        match &self.0.load().await?.credential {
            Credential::Bearer(token) => {
                Ok(Arc::new(GcpCredential { bearer: token.expose().to_owned() }))
            }
            // Not sent, since signing is off.
            Credential::Anonymous => Ok(Arc::new(GcpCredential { bearer: String::new() })),
            _ => Err(wrong_kind()),
        }
    }
}

/// [`Provider`] for Azure.
#[derive(Debug)]
pub(super) struct AzureProvider(pub(super) Provider);

#[async_trait]
impl CredentialProvider for AzureProvider {
    type Credential = AzureCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AzureCredential>> {
        let invalid = |what: &str| {
            generic(StoreError::new(StoreErrorKind::Denied, format!("the {what} isn't valid")))
        };
        Ok(Arc::new(match &self.0.load().await?.credential {
            Credential::AzureKey(key) => AzureCredential::AccessKey(
                AzureAccessKey::try_new(key.expose()).map_err(|_| invalid("Azure account key"))?,
            ),
            Credential::AzureSas(token) => AzureCredential::SASToken(
                split_sas(token.expose()).map_err(|_| invalid("SAS token"))?,
            ),
            Credential::Bearer(token) => AzureCredential::BearerToken(token.expose().to_owned()),
            _ => return Err(wrong_kind()),
        }))
    }
}
