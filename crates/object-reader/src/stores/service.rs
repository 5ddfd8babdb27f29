//! Opening of stores: which server, which credentials.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use object_store::RetryConfig;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::HttpConnector;
use object_store::gcp::GoogleCloudStorageBuilder;

use super::cloud::{AwsProvider, AzureProvider, CloudApi, CloudStore, GoogleProvider, Provider};
use super::connector::Connector;
use super::credentials::{Credential, CredentialSource, Credentials, ResolvedSource};
use super::plain::HttpStore;
use super::{S3Style, StoreConfig, StoreConfigError, aws, tokens};
use crate::http::{
    HttpClient, HttpProbe, HttpSettings, ProxyRules, ResponseObserver, insecure_message,
    is_loopback,
};
use crate::store::Store;
use crate::url::{ObjectUrl, Scheme, StoreUrl};

const GOOGLE_ENDPOINT: &str = "https://storage.googleapis.com";
const DEFAULT_REGION: &str = "us-east-1";

/// Address of the server of a store.
struct ServerAddress {
    /// URL, for S3 with the bucket.
    base: String,
    is_https: bool,
    /// Name or address without brackets.
    host: String,
    port: u16,
}

impl ServerAddress {
    /// Parses `https://HOST[:PORT][/PATH]`.
    fn parse(url: &str) -> Result<Self, String> {
        let parsed: ObjectUrl =
            url.parse().map_err(|error| format!("the store's endpoint: {error}"))?;
        let store = parsed.store();
        let (Some(port), None) = (store.port(), store.query()) else {
            return Err("the store's endpoint isn't https://HOST[:PORT]".to_owned());
        };
        Ok(Self {
            base: parsed.to_string().trim_end_matches('/').to_owned(),
            is_https: store.scheme() == Scheme::Https,
            host: store.host().to_owned(),
            port,
        })
    }
}

impl StoreConfig {
    /// Opens a store. Sends no requests, but reads the files with credentials and CAs.
    ///
    /// # Errors
    /// The configuration is invalid, or a file or an environment variable with credentials is
    /// missing or unusable.
    pub fn open(&self, url: &StoreUrl) -> Result<Arc<dyn Store>, StoreConfigError> {
        self.open_observed(url, None).map(|(store, _)| store)
    }

    /// Opens a store whose responses `observer` receives.
    pub(super) fn open_observed(
        &self,
        url: &StoreUrl,
        observer: Option<ResponseObserver>,
    ) -> Result<(Arc<dyn Store>, Arc<Credentials>), StoreConfigError> {
        let server = self.server(url)?;
        if !server.is_https && !is_loopback(&server.host) && !self.allow_insecure {
            return Err(insecure_message(&server.host).into());
        }
        let source = self.resolve_credentials(url)?;
        let is_anonymous = source.is_anonymous();
        let client = Arc::new(HttpClient::new(HttpSettings {
            user_agent: &self.user_agent,
            timeouts: self.timeouts,
            connect_patience: self.connect_patience,
            ca_file: self.ca_file.as_deref(),
            requires_tls: server.is_https,
            proxies: ProxyRules::new(&self.proxy, &self.environment)?,
            allow_insecure: self.allow_insecure,
            dialer: Arc::clone(&self.dialer),
            observer,
        })?);
        let credentials = Arc::new(Credentials::new(url.to_string(), source, Arc::clone(&client)));
        if url.scheme().is_http() {
            let store = HttpStore::new(url.clone(), client, Arc::clone(&credentials));
            return Ok((Arc::new(store), credentials));
        }
        let connector = Connector(client);
        let store = self.cloud_store(url, server, &credentials, is_anonymous, connector)?;
        Ok((Arc::new(store), credentials))
    }

    /// Opens a bucket without credentials, whose requests `connector` answers.
    pub(super) fn open_bucket(
        &self,
        url: &StoreUrl,
        connector: impl HttpConnector,
    ) -> Result<CloudStore, StoreConfigError> {
        let server = self.server(url)?;
        let client = Arc::new(HttpClient::new(HttpSettings {
            user_agent: &self.user_agent,
            timeouts: self.timeouts,
            connect_patience: None,
            ca_file: None,
            requires_tls: false,
            proxies: ProxyRules::new(&self.proxy, &self.environment)?,
            allow_insecure: false,
            dialer: Arc::clone(&self.dialer),
            observer: None,
        })?);
        let source = ResolvedSource::fixed(Credential::Anonymous);
        let credentials = Arc::new(Credentials::new(url.to_string(), source, client));
        self.cloud_store(url, server, &credentials, true, connector)
    }

    fn cloud_store(
        &self,
        url: &StoreUrl,
        server: ServerAddress,
        credentials: &Arc<Credentials>,
        is_anonymous: bool,
        connector: impl HttpConnector,
    ) -> Result<CloudStore, StoreConfigError> {
        let provider = Provider(Arc::clone(credentials));
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let bucket = url.host();
        let api: object_store::Result<Arc<dyn CloudApi>> = match url.scheme() {
            Scheme::Http | Scheme::Https => {
                return Err("the store isn't a bucket or container".to_owned().into());
            }
            Scheme::S3 => AmazonS3Builder::new()
                .with_bucket_name(bucket)
                .with_region(self.region())
                // The endpoint contains the bucket, whatever the style.
                .with_endpoint(server.base)
                .with_virtual_hosted_style_request(true)
                .with_credentials(Arc::new(AwsProvider(provider)))
                .with_skip_signature(is_anonymous)
                .with_retry(retry)
                .with_http_connector(connector)
                .build()
                .map(|api| Arc::new(api) as _),
            Scheme::Gcs => GoogleCloudStorageBuilder::new()
                .with_bucket_name(bucket)
                .with_base_url(&server.base)
                .with_credentials(Arc::new(GoogleProvider(provider)))
                .with_skip_signature(is_anonymous)
                .with_retry(retry)
                .with_http_connector(connector)
                .build()
                .map(|api| Arc::new(api) as _),
            Scheme::Azure => MicrosoftAzureBuilder::new()
                .with_container_name(bucket)
                .with_account(self.account()?)
                .with_endpoint(server.base)
                .with_credentials(Arc::new(AzureProvider(provider)))
                .with_skip_signature(is_anonymous)
                .with_retry(retry)
                .with_http_connector(connector)
                .build()
                .map(|api| Arc::new(api) as _),
        };
        Ok(CloudStore {
            label: url.to_string(),
            api: api.map_err(|_| "the bucket or the endpoint isn't valid".to_owned())?,
            credentials: Arc::clone(credentials),
            scheme: url.scheme(),
            lacks_versions: AtomicBool::new(false),
        })
    }

    /// Returns the way to the server of a store.
    pub(super) fn http_probe(&self, url: &StoreUrl) -> Result<HttpProbe, StoreConfigError> {
        let server = self.server(url)?;
        let proxies = ProxyRules::new(&self.proxy, &self.environment)?;
        let address = (server.is_https, server.host.as_str(), server.port);
        Ok(HttpProbe::new(address, &proxies, self.ca_file.as_deref())?)
    }

    /// Returns the hosts (without brackets) and ports to which a store may connect: the server, the
    /// services that issue credentials, or the proxies on the way to them.
    ///
    /// # Errors
    /// As for [`StoreConfig::open`].
    pub fn addresses(&self, url: &StoreUrl) -> Result<Vec<(String, u16)>, StoreConfigError> {
        let proxies = ProxyRules::new(&self.proxy, &self.environment)?;
        let mut servers = vec![self.server(url)?];
        match self.resolve_credentials(url)? {
            ResolvedSource::AwsService(service) => {
                servers.push(ServerAddress::parse(service.url())?);
            }
            ResolvedSource::TokenService(service) => {
                servers.push(ServerAddress::parse(service.url())?);
            }
            _ => {}
        }
        let mut addresses: Vec<(String, u16)> = servers
            .into_iter()
            .map(|server| match proxies.proxy_for(server.is_https, &server.host) {
                Some(proxy) => (proxy.host.clone(), proxy.port),
                None => (server.host, server.port),
            })
            .collect();
        addresses.dedup();
        Ok(addresses)
    }

    /// Returns the files that are read whenever credentials are renewed, for a sandbox: they must
    /// remain readable, also after they have been replaced.
    ///
    /// # Errors
    /// As for [`StoreConfig::open`].
    pub fn credential_files(&self, url: &StoreUrl) -> Result<Vec<PathBuf>, StoreConfigError> {
        let source = self.resolve_credentials(url)?;
        Ok(source.files_read().into_iter().map(Path::to_owned).collect())
    }

    /// Returns the files with secrets that last, such as keys and passwords, for a check of their
    /// permissions.
    ///
    /// # Errors
    /// As for [`StoreConfig::open`].
    pub fn secret_files(&self, url: &StoreUrl) -> Result<Vec<PathBuf>, StoreConfigError> {
        Ok(self.resolve_credentials(url)?.secret_files())
    }

    fn region(&self) -> String {
        let region = self.region.clone().or_else(|| aws::region(&self.environment));
        region.unwrap_or_else(|| DEFAULT_REGION.to_owned())
    }

    fn account(&self) -> Result<String, String> {
        let account = self.account.as_deref();
        let account = account.or_else(|| self.environment.get("AZURE_STORAGE_ACCOUNT"));
        match account {
            Some(account) if account.bytes().all(|b| b.is_ascii_alphanumeric()) => {
                Ok(account.to_owned())
            }
            Some(_) => Err("the Azure account isn't a name of letters and digits".to_owned()),
            None => Err("an Azure store needs the name of its account".to_owned()),
        }
    }

    fn server(&self, url: &StoreUrl) -> Result<ServerAddress, String> {
        let bucket = url.host();
        match url.scheme() {
            Scheme::Http | Scheme::Https => ServerAddress::parse(&StoreUrl::to_string(url)),
            Scheme::Gcs => {
                ServerAddress::parse(self.endpoint.as_deref().unwrap_or(GOOGLE_ENDPOINT))
            }
            Scheme::Azure => match &self.endpoint {
                Some(endpoint) => ServerAddress::parse(endpoint),
                None => ServerAddress::parse(&format!(
                    "https://{}.blob.core.windows.net",
                    self.account()?
                )),
            },
            Scheme::S3 => {
                let region = self.region();
                let variable = |name| self.environment.get(name);
                let endpoint = self
                    .endpoint
                    .as_deref()
                    .or_else(|| variable("AWS_ENDPOINT_URL_S3"))
                    .or_else(|| variable("AWS_ENDPOINT_URL"));
                let is_virtual = match self.style {
                    // A wildcard certificate doesn't cover names with further dots.
                    S3Style::Auto => endpoint.is_none() && !bucket.contains('.'),
                    S3Style::Path => false,
                    S3Style::VirtualHost => true,
                };
                let endpoint = match endpoint {
                    Some(endpoint) => ServerAddress::parse(endpoint)?,
                    None => ServerAddress::parse(&format!(
                        "https://s3.{region}.{}",
                        aws::domain(&region)
                    ))?,
                };
                if !is_virtual {
                    return ServerAddress::parse(&format!("{}/{bucket}", endpoint.base));
                }
                let (scheme, authority) =
                    endpoint.base.split_once("://").unwrap_or(("https", &endpoint.base));
                if endpoint.host.parse::<IpAddr>().is_ok() {
                    return Err("an endpoint that is an address needs the style `path`".to_owned());
                }
                ServerAddress::parse(&format!("{scheme}://{bucket}.{authority}"))
            }
        }
    }

    fn resolve_credentials(&self, url: &StoreUrl) -> Result<ResolvedSource, String> {
        let (source, environment) = (&self.credentials, &self.environment);
        match url.scheme() {
            Scheme::S3 => aws::resolve(source, environment, &self.region()),
            Scheme::Gcs => tokens::resolve_google(source, environment),
            Scheme::Azure => tokens::resolve_azure(source, environment),
            Scheme::Http | Scheme::Https => match source {
                CredentialSource::File(path) => {
                    let source = ResolvedSource::HttpFile(path.clone());
                    super::credentials::read_secret(path).map_err(|error| error.message)?;
                    Ok(source)
                }
                CredentialSource::Auto | CredentialSource::Anonymous => {
                    Ok(ResolvedSource::fixed(Credential::Anonymous))
                }
                _ => Err("credentials for an HTTP server come from a file".to_owned()),
            },
        }
    }
}
