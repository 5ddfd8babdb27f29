//! Buckets that exist in memory only: object_store parses what a server would have sent.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt;
use hyper::Response;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient as CloudClient, HttpConnector, HttpError, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use parking_lot::Mutex;

use super::{CredentialSource, Environment, StoreConfig, StoreConfigError};
use crate::store::{ListedObject, Store, StoreError, StoreErrorKind};
use crate::url::ObjectUrl;

/// The last page of a listing, of S3, Google Cloud and Azure.
const EMPTY_PAGE: &str = "<Results><Blobs></Blobs></Results>";

/// Returns the objects in the folder of `url`, in an `s3`, `gs` or `az` store, if the first page of
/// its listing is `page`.
#[doc(hidden)]
pub fn parse_xml_listing(url: &ObjectUrl, page: Bytes) -> Result<Vec<ListedObject>, StoreError> {
    let failed = |message: String| StoreError::new(StoreErrorKind::Unsupported, message);
    let config = StoreConfig {
        endpoint: Some("http://localhost".to_owned()),
        account: Some("account".to_owned()),
        credentials: CredentialSource::Anonymous,
        environment: Environment::default(),
        ..StoreConfig::default()
    };
    let connector = CannedConnector(Arc::new(Mutex::new(Some(page))));
    let store = config
        .open_bucket(url.store(), connector)
        .map_err(|error: StoreConfigError| failed(error.to_string()))?;
    // Nothing waits.
    let listed = store.list(url.key()).now_or_never();
    listed.unwrap_or_else(|| Err(failed("the listing waits".to_owned())))
}

/// Responds with the page, and then with empty ones.
#[derive(Debug, Clone)]
struct CannedConnector(Arc<Mutex<Option<Bytes>>>);

impl HttpConnector for CannedConnector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<CloudClient> {
        Ok(CloudClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for CannedConnector {
    async fn call(&self, _: HttpRequest) -> Result<HttpResponse, HttpError> {
        let page =
            self.0.lock().take().unwrap_or_else(|| Bytes::from_static(EMPTY_PAGE.as_bytes()));
        Ok(Response::new(HttpResponseBody::from(page)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_parsed_without_a_server() {
        let s3 = "<ListBucketResult><Contents><Key>v7/a &amp; b.hxz</Key><Size>1</Size>\
                  <LastModified>2026-11-30T00:00:00Z</LastModified><ETag>\"1\"</ETag></Contents>\
                  <NextContinuationToken>next</NextContinuationToken></ListBucketResult>";
        let azure = "<EnumerationResults><Blobs><Blob><Name>v7/a &amp; b.hxz</Name><Properties>\
                     <Last-Modified>Mon, 30 Nov 2026 00:00:00 GMT</Last-Modified>\
                     <Content-Length>1</Content-Length><Content-Type>x</Content-Type>\
                     <Etag>1</Etag></Properties></Blob></Blobs></EnumerationResults>";
        for (url, page) in [("s3://b/v7/", s3), ("gs://b/v7/", s3), ("az://b/v7/", azure)] {
            let listed = parse_xml_listing(&url.parse().unwrap(), Bytes::from(page)).unwrap();
            assert_eq!(listed.len(), 1, "{url}");
            assert_eq!(listed[0].name, "a & b.hxz", "{url}");
            let version = listed[0].version.as_ref().unwrap();
            assert_eq!((version.length, version.etag.as_deref()), (1, Some("\"1\"")), "{url}");
            let error = parse_xml_listing(&url.parse().unwrap(), Bytes::from("<A>")).unwrap_err();
            assert_eq!(error.kind, StoreErrorKind::Unsupported, "{url}: {error}");
        }
    }
}
