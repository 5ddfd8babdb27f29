//! Credentials: their sources, and a cache that renews them.

use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use tokio::time::Instant;

use super::Secret;
use super::aws::AwsCredentialService;
use super::profile::Profile;
use super::tokens::{TokenService, google_token};
use crate::http::HttpClient;
use crate::response::{RawResponse, rejects_credentials};
use crate::store::{StoreError, StoreErrorKind};

/// Time before their expiry at which credentials are renewed, at most a quarter of their lifetime.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// Time between attempts to renew credentials.
const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum size of a file with credentials, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Source of the credentials for a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CredentialSource {
    /// The first one that is configured: environment variables, web identity, files in the usual
    /// place, the container's credentials service. The instance metadata service isn't asked. HTTP
    /// servers get no credentials.
    #[default]
    Auto,
    /// Environment variables with keys or tokens.
    Environment,
    /// The instance metadata service: version 2 on AWS, also Google Cloud and Azure.
    Instance,
    /// A Kubernetes service account: `AWS_WEB_IDENTITY_TOKEN_FILE` with `AWS_ROLE_ARN`, or
    /// `AZURE_FEDERATED_TOKEN_FILE` with `AZURE_CLIENT_ID` and `AZURE_TENANT_ID`.
    WebIdentity,
    /// A file, which is read again when it changes. For S3 it has the format of
    /// `~/.aws/credentials`, for Google Cloud it is a service account's JSON key. For Azure it
    /// contains an account key or a SAS token. For HTTP servers it contains a bearer token, or a
    /// user and a password with a colon between them.
    File(PathBuf),
    /// None: requests aren't signed.
    Anonymous,
}

/// Credentials for requests.
pub(super) enum Credential {
    Anonymous,
    Aws {
        key_id: String,
        secret_key: Secret,
        session_token: Option<Secret>,
    },
    Bearer(Secret),
    /// User and password, with a colon between them.
    Basic(Secret),
    AzureKey(Secret),
    AzureSas(Secret),
}

/// Credentials with their lifetime.
pub(super) struct Loaded {
    pub(super) credential: Credential,
    pub(super) expiry: Option<SystemTime>,
    /// Time at which the credentials were obtained.
    pub(super) since: SystemTime,
}

impl Loaded {
    pub(super) fn new(credential: Credential, expiry: Option<SystemTime>) -> Self {
        Self { credential, expiry, since: SystemTime::now() }
    }

    /// Returns true if the credentials should be renewed.
    fn is_due(&self, now: SystemTime) -> bool {
        self.expiry.is_some_and(|expiry| {
            let lifetime = expiry.duration_since(self.since).unwrap_or_default();
            now + RENEW_BEFORE.min(lifetime / 4) >= expiry
        })
    }

    fn has_expired(&self, now: SystemTime) -> bool {
        self.expiry.is_some_and(|expiry| now >= expiry)
    }
}

/// Description of credentials, without secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialsSummary {
    /// Where they come from, in words.
    pub source: String,
    /// True if there are none.
    pub is_anonymous: bool,
    /// True if the store rejects them if this machine's clock is wrong.
    pub signs_with_clock: bool,
    /// Time at which they expire, if they do and that is known.
    pub expiry: Option<SystemTime>,
}

/// Place from which credentials are loaded.
pub(super) enum ResolvedSource {
    /// Credentials that don't change while the program runs.
    Fixed(Arc<Loaded>),
    /// A profile in files of the AWS SDKs.
    AwsProfile(Profile),
    /// A service that issues temporary credentials for AWS.
    AwsService(AwsCredentialService),
    /// A Google service account's key.
    GoogleKey(PathBuf),
    /// A service that issues bearer tokens.
    TokenService(TokenService),
    /// A file with an Azure account key or a SAS token.
    AzureFile(PathBuf),
    /// A file with credentials for an HTTP server.
    HttpFile(PathBuf),
}

impl ResolvedSource {
    pub(super) fn fixed(credential: Credential) -> Self {
        Self::Fixed(Arc::new(Loaded::new(credential, None)))
    }

    pub(super) fn is_anonymous(&self) -> bool {
        matches!(self, Self::Fixed(loaded) if matches!(loaded.credential, Credential::Anonymous))
    }

    /// Describes the source, without secrets.
    fn describe(&self) -> String {
        let file = |path: &Path| format!("the file {}", path.display());
        match self {
            Self::Fixed(_) if self.is_anonymous() => "none".to_owned(),
            Self::Fixed(_) => "environment variables".to_owned(),
            Self::AwsProfile(profile) => profile.describe(),
            Self::AwsService(service) => service.describe(),
            Self::GoogleKey(path) => format!("the service account's key in {}", path.display()),
            Self::TokenService(service) => service.describe().to_owned(),
            Self::AzureFile(path) | Self::HttpFile(path) => file(path),
        }
    }

    /// Returns the files whose changes have to be noticed.
    fn files(&self) -> Vec<&Path> {
        match self {
            Self::Fixed(_) | Self::AwsService(_) | Self::TokenService(_) => Vec::new(),
            Self::AwsProfile(profile) => profile.files(),
            Self::GoogleKey(path) | Self::AzureFile(path) | Self::HttpFile(path) => vec![path],
        }
    }

    /// Returns the files that are read whenever credentials are loaded.
    pub(super) fn files_read(&self) -> Vec<&Path> {
        match self {
            Self::AwsService(service) => service.token_file().into_iter().collect(),
            Self::TokenService(service) => service.token_file().into_iter().collect(),
            _ => self.files(),
        }
    }

    /// Returns the files with secrets that last. Tokens of a platform, which are short-lived and
    /// whose permissions it decides on, aren't among them.
    pub(super) fn secret_files(&self) -> Vec<PathBuf> {
        match self {
            Self::Fixed(_) | Self::AwsService(_) | Self::TokenService(_) => Vec::new(),
            Self::AwsProfile(profile) => profile.secret_files(),
            Self::GoogleKey(path) | Self::AzureFile(path) | Self::HttpFile(path) => {
                vec![path.clone()]
            }
        }
    }

    async fn load(&self, client: &HttpClient) -> Result<Arc<Loaded>, StoreError> {
        let loaded = match self {
            Self::Fixed(loaded) => return Ok(Arc::clone(loaded)),
            Self::AwsProfile(profile) => profile.load()?,
            Self::AwsService(service) => service.load(client).await?,
            Self::GoogleKey(path) => google_token(&read_secret(path)?, path)?,
            Self::TokenService(service) => service.load(client).await?,
            Self::AzureFile(path) => {
                let secret = read_secret(path)?;
                Loaded::new(azure_credential(secret.expose().trim()), None)
            }
            Self::HttpFile(path) => {
                let secret = read_secret(path)?;
                Loaded::new(http_credential(&secret, path)?, None)
            }
        };
        Ok(Arc::new(loaded))
    }
}

/// Returns the credentials in an account key or a SAS token.
pub(super) fn azure_credential(text: &str) -> Credential {
    let text = text.trim_start_matches('?');
    if text.contains("sig=") {
        Credential::AzureSas(Secret::new(text))
    } else {
        Credential::AzureKey(Secret::new(text))
    }
}

fn http_credential(secret: &Secret, path: &Path) -> Result<Credential, StoreError> {
    let line = secret.expose().trim();
    if line.is_empty() || line.chars().any(char::is_control) {
        return Err(denied(format!(
            "{}: expected one line with a token, or a user and a password",
            path.display()
        )));
    }
    Ok(match line.strip_prefix("Bearer ") {
        None if line.contains(':') => Credential::Basic(Secret::new(line)),
        token => Credential::Bearer(Secret::new(token.unwrap_or(line).trim())),
    })
}

/// Creates an error about credentials that can't be obtained.
pub(super) fn denied(message: impl Into<String>) -> StoreError {
    StoreError::new(StoreErrorKind::Denied, message)
}

/// Reads a file that contains secrets.
pub(super) fn read_secret(path: &Path) -> Result<Secret, StoreError> {
    let failed = |error: std::io::Error| denied(format!("{}: {error}", path.display()));
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(denied(format!("{}: too large for a file of credentials", path.display())));
    }
    fs::read_to_string(path).map(Secret::new).map_err(failed)
}

/// Identity of a file's content: inode, length and times.
#[derive(Clone, PartialEq, Eq)]
struct FileStamp(Option<(u64, u64, i64, i64)>);

impl FileStamp {
    fn of(path: &Path) -> Self {
        let stamp = |it: Metadata| (it.ino(), it.size(), it.mtime(), it.mtime_nsec());
        Self(fs::metadata(path).ok().map(stamp))
    }
}

/// Credentials of one store, which are renewed before they expire and when their file changes.
pub(super) struct Credentials {
    /// Label of the store.
    store: String,
    source: ResolvedSource,
    client: Arc<HttpClient>,
    cached: RwLock<Option<Cached>>,
    /// Held while credentials are loaded.
    loading: tokio::sync::Mutex<LoadHistory>,
}

#[derive(Default)]
struct LoadHistory {
    /// Time of the last renewal after a rejection.
    last_forced: Option<Instant>,
    /// The last failure, which is that of all requests that waited for it.
    last_failure: Option<(Instant, StoreError)>,
    /// Expiry that has been warned of.
    warned_of: Option<SystemTime>,
}

impl LoadHistory {
    /// Warns of credentials that expire soon or have expired, once for each expiry.
    fn warn_expiring(&mut self, store: &str, loaded: &Loaded, why: &dyn fmt::Display) {
        let Some(expiry) = loaded.expiry else { return };
        let left = expiry.duration_since(SystemTime::now()).unwrap_or_default();
        if left > RENEW_BEFORE || self.warned_of.replace(expiry) == Some(expiry) {
            return;
        }
        tracing::warn!(
            reason = "store_credentials_expire",
            store,
            "the credentials for {store} expire in {} s: {why}",
            left.as_secs()
        );
    }
}

struct Cached {
    loaded: Arc<Loaded>,
    stamps: Vec<FileStamp>,
    /// Time before which a failed renewal isn't repeated.
    retry_at: Option<Instant>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// Creates the credentials of the store with the label `store`, without loading them.
    pub(super) fn new(store: String, source: ResolvedSource, client: Arc<HttpClient>) -> Self {
        let (cached, loading) = (RwLock::default(), tokio::sync::Mutex::default());
        Self { store, source, client, cached, loading }
    }

    /// Returns valid credentials.
    pub(super) async fn get(&self) -> Result<Arc<Loaded>, StoreError> {
        let stamps: Vec<_> = self.source.files().into_iter().map(FileStamp::of).collect();
        if let Some(loaded) = self.fresh(&stamps) {
            return Ok(loaded);
        }
        let asked = Instant::now();
        let mut history = self.loading.lock().await;
        if let Some(loaded) = self.fresh(&stamps) {
            return Ok(loaded);
        }
        match &history.last_failure {
            Some((at, error)) if *at >= asked => return Err(error.clone()),
            _ => {}
        }
        match self.source.load(&self.client).await {
            Ok(loaded) => {
                if self.expiry() == loaded.expiry {
                    history.warn_expiring(&self.store, &loaded, &"there are no newer ones");
                }
                self.keep(&loaded, stamps);
                Ok(loaded)
            }
            Err(error) => {
                let mut cached = self.cached.write();
                match cached.as_mut() {
                    Some(old) if !old.loaded.has_expired(SystemTime::now()) => {
                        history.warn_expiring(&self.store, &old.loaded, &error);
                        tracing::debug!(%error, store = self.store, "credentials not renewed");
                        old.retry_at = Some(Instant::now() + RENEW_INTERVAL);
                        Ok(Arc::clone(&old.loaded))
                    }
                    _ => {
                        history.last_failure = Some((Instant::now(), error.clone()));
                        Err(error)
                    }
                }
            }
        }
    }

    /// Returns the cached credentials, unless they should be renewed.
    fn fresh(&self, stamps: &[FileStamp]) -> Option<Arc<Loaded>> {
        let cached = self.cached.read();
        let cached = cached.as_ref()?;
        let now = SystemTime::now();
        let is_fresh = !cached.loaded.is_due(now) && cached.stamps == stamps;
        let waits = cached.retry_at.is_some_and(|at| Instant::now() < at)
            && !cached.loaded.has_expired(now);
        (is_fresh || waits).then(|| Arc::clone(&cached.loaded))
    }

    fn keep(&self, loaded: &Arc<Loaded>, stamps: Vec<FileStamp>) {
        let cached = Cached { loaded: Arc::clone(loaded), stamps, retry_at: None };
        *self.cached.write() = Some(cached);
    }

    /// Loads credentials anew because the store rejected `used`. Returns false if that is
    /// pointless: they can't change, or were renewed by force a short time ago.
    pub(super) async fn renew(&self, used: &Arc<Loaded>) -> Result<bool, StoreError> {
        if matches!(self.source, ResolvedSource::Fixed(_)) {
            return Ok(false);
        }
        let asked = Instant::now();
        let mut history = self.loading.lock().await;
        let was_renewed =
            self.cached.read().as_ref().is_some_and(|cached| !Arc::ptr_eq(&cached.loaded, used));
        if was_renewed {
            return Ok(true);
        }
        if history.last_forced.is_some_and(|at| at.elapsed() < RENEW_INTERVAL) {
            return Ok(false);
        }
        match &history.last_failure {
            Some((at, error)) if *at >= asked => return Err(error.clone()),
            _ => {}
        }
        let stamps = self.source.files().into_iter().map(FileStamp::of).collect();
        match self.source.load(&self.client).await {
            Ok(loaded) => {
                history.last_forced = Some(Instant::now());
                self.keep(&loaded, stamps);
                Ok(true)
            }
            Err(error) => {
                let now = Instant::now();
                // A service that is down for a moment is asked again with the next attempt.
                if !error.kind.is_transient() {
                    history.last_forced = Some(now);
                }
                history.last_failure = Some((now, error.clone()));
                Err(error)
            }
        }
    }

    /// Sends a request. If the response rejects the credentials, renews them and sends it once
    /// more.
    pub(super) async fn send_renewing<F, R>(&self, send: F) -> Result<RawResponse, StoreError>
    where
        F: Fn(Arc<Loaded>) -> R,
        R: Future<Output = Result<RawResponse, StoreError>>,
    {
        let used = self.get().await?;
        let response = send(Arc::clone(&used)).await?;
        if !rejects_credentials(&response) {
            return Ok(response);
        }
        match self.renew(&used).await {
            Ok(true) => send(self.get().await?).await,
            Ok(false) => Ok(response),
            Err(mut error) => {
                error.message =
                    format!("the credentials were rejected, and not renewed: {}", error.message);
                if !error.kind.is_transient() && error.kind != StoreErrorKind::ClockSkew {
                    error.kind = StoreErrorKind::CredentialsExpired;
                }
                Err(error)
            }
        }
    }

    /// Obtains the credentials, and describes them.
    pub(super) async fn summary(&self) -> Result<CredentialsSummary, StoreError> {
        let loaded = self.get().await?;
        let signs = matches!(loaded.credential, Credential::Aws { .. } | Credential::AzureKey(_))
            || matches!(self.source, ResolvedSource::GoogleKey(_));
        Ok(CredentialsSummary {
            source: self.source.describe(),
            is_anonymous: self.source.is_anonymous(),
            signs_with_clock: signs,
            expiry: loaded.expiry,
        })
    }

    /// Returns the time at which the credentials in use expire.
    pub(super) fn expiry(&self) -> Option<SystemTime> {
        self.cached.read().as_ref().and_then(|cached| cached.loaded.expiry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_expiry_is_warned_of_once() {
        let mut history = LoadHistory::default();
        let mut warned = |expiry: Option<u64>| {
            let expiry = expiry.map(|it| SystemTime::UNIX_EPOCH + Duration::from_secs(it));
            let loaded = Loaded::new(Credential::Anonymous, expiry);
            history.warn_expiring("s3://golden", &loaded, &"");
            history.warned_of
        };
        assert_eq!(warned(None), None);
        assert_eq!(warned(Some(1 << 40)), None);
        let first = warned(Some(1));
        assert!(first.is_some() && warned(Some(1)) == first && warned(Some(2)) != first);
    }

    #[test]
    fn credentials_are_renewed_before_they_expire() {
        let now = SystemTime::now();
        let seconds = Duration::from_secs;
        for (lifetime, due_before_expiry) in [(3600, 300), (400, 100), (0, 0)] {
            let loaded = Loaded {
                credential: Credential::Anonymous,
                expiry: Some(now + seconds(lifetime)),
                since: now,
            };
            let due = now + seconds(lifetime - due_before_expiry);
            assert!(loaded.is_due(due), "{lifetime}");
            assert!(lifetime == 0 || !loaded.is_due(due - seconds(1)), "{lifetime}");
            assert!(loaded.has_expired(now + seconds(lifetime)));
        }
        assert!(!Loaded::new(Credential::Anonymous, None).is_due(now + seconds(1_000_000)));
    }

    #[test]
    fn azure_keys_and_signatures_are_told_apart() {
        assert!(matches!(azure_credential("Eby8vdM0=="), Credential::AzureKey(_)));
        assert!(matches!(azure_credential("?sv=1&sig=x"), Credential::AzureSas(_)));
    }
}
