//! The object server.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use crate::credentials::Issuer;
use crate::encoding::percent_encode;
use crate::frontend::Frontend;
use crate::log::RequestLog;
use crate::object::{Object, Objects};
use crate::object_answer::ObjectResponder;
use crate::script::Script;
use crate::tls;

/// Directory index of a plain HTTP server. A client that accepts `application/json` gets JSON
/// instead of HTML.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Index {
    /// Folders are forbidden (403).
    Off,
    /// HTML, as of nginx's `autoindex on`.
    #[default]
    Html,
    /// JSON, as of nginx's `autoindex_format json`.
    Json,
}

/// Settings of an object server. By default it is a plain HTTP server without objects.
#[derive(Debug, Default)]
pub struct Builder {
    folder: Option<PathBuf>,
    https: bool,
    index: Index,
    is_s3: bool,
    issuer: Option<Issuer>,
    base_domain: Option<String>,
    address: Option<SocketAddr>,
    names: Vec<String>,
}

impl Builder {
    /// Serves the files below a folder too. They are read anew for each request.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Serves over TLS, with a certificate of a throw-away CA.
    #[must_use]
    pub fn https(mut self) -> Self {
        self.https = true;
        self
    }

    /// Selects the directory index.
    #[must_use]
    pub fn index(mut self, index: Index) -> Self {
        self.index = index;
        self
    }

    /// Speaks S3: the first part of a key is the bucket. Without [`Self::credentials`], requests
    /// need no signature.
    #[must_use]
    pub fn s3(mut self) -> Self {
        self.is_s3 = true;
        self
    }

    /// Speaks S3 and requires signatures with valid credentials of this issuer.
    #[must_use]
    pub fn credentials(mut self, issuer: &Issuer) -> Self {
        self.issuer = Some(issuer.clone());
        self.s3()
    }

    /// Speaks S3 in virtual-host style too: the host `bucket.domain` is a bucket.
    #[must_use]
    pub fn base_domain(mut self, domain: &str) -> Self {
        self.base_domain = Some(domain.to_owned());
        self.s3()
    }

    /// Listens on this address instead of a free port of 127.0.0.1.
    #[must_use]
    pub fn address(mut self, address: SocketAddr) -> Self {
        self.address = Some(address);
        self
    }

    /// Adds a name to the certificate.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.names.push(name.to_owned());
        self
    }

    /// Starts the server.
    ///
    /// # Errors
    /// The system refused a socket or a thread, or the certificate couldn't be created.
    pub fn start(self) -> io::Result<ObjectServer> {
        let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
        names.extend(self.names);
        names.extend(self.base_domain.iter().map(|domain| format!("*.{domain}")));
        let (acceptor, ca_pem) = self.https.then(|| tls::acceptor(names)).transpose()?.unzip();
        let responder = Arc::new(ObjectResponder {
            objects: Objects::new(self.folder),
            index: self.index,
            is_s3: self.is_s3,
            issuer: self.issuer,
            base_domain: self.base_domain,
        });
        let address = self.address.unwrap_or((Ipv4Addr::LOCALHOST, 0).into());
        let frontend = Frontend::start(address, Arc::clone(&responder) as _, acceptor)?;
        Ok(ObjectServer { frontend, responder, ca_pem })
    }
}

/// A running object server.
pub struct ObjectServer {
    frontend: Frontend,
    responder: Arc<ObjectResponder>,
    ca_pem: Option<String>,
}

impl ObjectServer {
    /// Returns the settings of a server that can be started.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.frontend.address()
    }

    /// Returns its URL without a path, for `--store-endpoint`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.ca_pem.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// Returns the URL of an object or folder.
    #[must_use]
    pub fn url(&self, key: &str) -> String {
        format!("{}/{}", self.endpoint(), percent_encode(key, true))
    }

    /// Returns the certificate of the CA, if it serves over TLS.
    #[must_use]
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// Adds or replaces an object in memory. The entity tag depends on the bytes.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        self.responder.objects.insert(key, Object::new(bytes.into()));
    }

    /// The same with a given entity tag, with its quotation marks.
    pub fn put_with_etag(&self, key: &str, bytes: impl Into<Bytes>, etag: &str) {
        let object = Object { etag: etag.to_owned(), ..Object::new(bytes.into()) };
        self.responder.objects.insert(key, object);
    }

    /// Removes an object from memory. Returns false if there was none.
    pub fn remove(&self, key: &str) -> bool {
        self.responder.objects.remove(key)
    }

    /// Replaces the script, for requests from now on.
    pub fn set_script(&self, script: Script) {
        self.frontend.set_script(script);
    }

    /// Returns the log of all requests.
    #[must_use]
    pub fn log(&self) -> &RequestLog {
        &self.frontend.log
    }

    /// Closes the socket and all connections; new ones are refused.
    pub fn stop(&self) {
        self.frontend.listener.close();
    }

    /// Listens again on the same port.
    ///
    /// # Errors
    /// The port has been taken by another process.
    pub fn restart(&self) -> io::Result<()> {
        self.frontend.listener.reopen()
    }

    /// Closes all connections; new ones are accepted.
    pub fn disconnect_all(&self) {
        self.frontend.listener.disconnect_all();
    }
}

impl std::fmt::Debug for ObjectServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "object server at {}", self.endpoint())
    }
}
