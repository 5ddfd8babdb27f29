//! Bearer tokens of Google Cloud and Azure.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use hyper::Request;
use hyper::header::CONTENT_TYPE;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use serde_json::json;

use super::aws::exchange;
use super::credentials::{
    Credential, CredentialSource, Loaded, ResolvedSource, azure_credential, denied, read_secret,
};
use super::{Environment, Secret};
use crate::http::HttpClient;
use crate::store::StoreError;

/// Lifetime of a token that a service account's key signs.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);
const GOOGLE_SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_only";
const GOOGLE_METADATA: &str = "169.254.169.254";
const AZURE_METADATA: &str = "http://169.254.169.254";
const AZURE_AUTHORITY: &str = "https://login.microsoftonline.com";
const AZURE_RESOURCE: &str = "https%3A%2F%2Fstorage.azure.com";

/// Chooses the source of the credentials for Google Cloud Storage.
pub(super) fn resolve_google(
    source: &CredentialSource,
    environment: &Environment,
) -> Result<ResolvedSource, String> {
    let from_environment = || {
        let path = environment.get("GOOGLE_APPLICATION_CREDENTIALS")?;
        Some(PathBuf::from(path))
    };
    let path = match source {
        CredentialSource::Anonymous => return Ok(ResolvedSource::fixed(Credential::Anonymous)),
        CredentialSource::Instance => {
            let host = environment.get("GCE_METADATA_HOST").unwrap_or(GOOGLE_METADATA);
            let endpoint = format!("http://{host}");
            return Ok(ResolvedSource::TokenService(TokenService::GoogleInstance { endpoint }));
        }
        CredentialSource::WebIdentity => {
            return Err(
                "web identity isn't supported for Google Cloud: on GKE choose `instance`, \
                        which gives the tokens of the workload identity"
                    .to_owned(),
            );
        }
        CredentialSource::File(path) => path.clone(),
        CredentialSource::Auto => from_environment().ok_or(
            "GOOGLE_APPLICATION_CREDENTIALS isn't set: name a file with a service account's key, \
             or choose `instance` (GCE, GKE) or `anonymous` (a public bucket)",
        )?,
        CredentialSource::Environment => {
            from_environment().ok_or("GOOGLE_APPLICATION_CREDENTIALS isn't set")?
        }
    };
    let key = read_secret(&path).map_err(|error| error.message)?;
    google_token(&key, &path).map_err(|error| error.message)?;
    Ok(ResolvedSource::GoogleKey(path))
}

/// Chooses the source of the credentials for Azure.
pub(super) fn resolve_azure(
    source: &CredentialSource,
    environment: &Environment,
) -> Result<ResolvedSource, String> {
    let from_environment = || {
        ["AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"]
            .into_iter()
            .find_map(|name| environment.get(name))
            .map(|text| ResolvedSource::fixed(azure_credential(text)))
    };
    let federated = || {
        let authority = environment.get("AZURE_AUTHORITY_HOST").unwrap_or(AZURE_AUTHORITY);
        Some(ResolvedSource::TokenService(TokenService::AzureFederated {
            authority: authority.trim_end_matches('/').to_owned(),
            tenant: environment.get("AZURE_TENANT_ID")?.to_owned(),
            client_id: environment.get("AZURE_CLIENT_ID")?.to_owned(),
            token_file: environment.get("AZURE_FEDERATED_TOKEN_FILE")?.into(),
        }))
    };
    match source {
        CredentialSource::Anonymous => Ok(ResolvedSource::fixed(Credential::Anonymous)),
        CredentialSource::File(path) => {
            read_secret(path).map_err(|error| error.message)?;
            Ok(ResolvedSource::AzureFile(path.clone()))
        }
        CredentialSource::Instance => {
            let endpoint = environment.get("AZURE_POD_IDENTITY_AUTHORITY_HOST");
            Ok(ResolvedSource::TokenService(TokenService::AzureInstance {
                endpoint: endpoint.unwrap_or(AZURE_METADATA).trim_end_matches('/').to_owned(),
                client_id: environment.get("AZURE_CLIENT_ID").map(str::to_owned),
            }))
        }
        CredentialSource::WebIdentity => federated().ok_or_else(|| {
            "AZURE_FEDERATED_TOKEN_FILE, AZURE_CLIENT_ID and AZURE_TENANT_ID aren't set".to_owned()
        }),
        CredentialSource::Environment => from_environment().ok_or_else(|| {
            "neither AZURE_STORAGE_KEY nor AZURE_STORAGE_SAS_TOKEN is set".to_owned()
        }),
        CredentialSource::Auto => from_environment().or_else(federated).ok_or_else(|| {
            "no Azure credentials found in the environment: name a file with an account key or a \
             SAS token, or choose `instance` (a managed identity) or `anonymous`"
                .to_owned()
        }),
    }
}

/// Service that issues bearer tokens.
pub(super) enum TokenService {
    /// Metadata service of Google Cloud.
    GoogleInstance { endpoint: String },
    /// Metadata service of Azure.
    AzureInstance { endpoint: String, client_id: Option<String> },
    /// Entra ID, for a Kubernetes service account.
    AzureFederated { authority: String, tenant: String, client_id: String, token_file: PathBuf },
}

/// Response of a token service (RFC 6749, section 5.1). Azure's metadata service sends the lifetime
/// as a string.
#[derive(Deserialize)]
struct IssuedToken {
    access_token: Secret,
    expires_in: serde_json::Value,
}

impl TokenService {
    pub(super) fn describe(&self) -> &'static str {
        match self {
            Self::GoogleInstance { .. } | Self::AzureInstance { .. } => {
                "the instance metadata service"
            }
            Self::AzureFederated { .. } => "the web identity, by Entra ID",
        }
    }

    /// Returns the URL of the service.
    pub(super) fn url(&self) -> &str {
        match self {
            Self::GoogleInstance { endpoint } | Self::AzureInstance { endpoint, .. } => endpoint,
            Self::AzureFederated { authority, .. } => authority,
        }
    }

    /// Returns the file with the token that is exchanged for another one.
    pub(super) fn token_file(&self) -> Option<&Path> {
        match self {
            Self::AzureFederated { token_file, .. } => Some(token_file),
            Self::GoogleInstance { .. } | Self::AzureInstance { .. } => None,
        }
    }

    pub(super) async fn load(&self, client: &HttpClient) -> Result<Loaded, StoreError> {
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let body = match self {
            Self::GoogleInstance { endpoint } => {
                let path = "computeMetadata/v1/instance/service-accounts/default/token";
                let request = Request::get(format!("{endpoint}/{path}"))
                    .header("metadata-flavor", "Google")
                    .body(Bytes::new());
                exchange(client, request, "the instance metadata service", true).await?
            }
            Self::AzureInstance { endpoint, client_id } => {
                let mut url = format!(
                    "{endpoint}/metadata/identity/oauth2/token?api-version=2018-02-01\
                     &resource={AZURE_RESOURCE}"
                );
                if let Some(client_id) = client_id {
                    url.push_str(&format!("&client_id={}", encode(client_id)));
                }
                let request = Request::get(url).header("metadata", "true").body(Bytes::new());
                exchange(client, request, "the instance metadata service", true).await?
            }
            Self::AzureFederated { authority, tenant, client_id, token_file } => {
                let token = read_secret(token_file)?;
                let form = format!(
                    "grant_type=client_credentials&scope={AZURE_RESOURCE}%2F.default&client_id={}\
                     &client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type\
                     %3Ajwt-bearer&client_assertion={}",
                    encode(client_id),
                    encode(token.expose().trim()),
                );
                let request = Request::post(format!("{authority}/{tenant}/oauth2/v2.0/token"))
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(Bytes::from(form));
                exchange(client, request, "Entra ID", false).await?
            }
        };
        // The parser's own message might quote secrets.
        let issued: IssuedToken = serde_json::from_slice(&body)
            .map_err(|_| denied("the response with a token isn't the expected JSON"))?;
        let seconds = match &issued.expires_in {
            serde_json::Value::String(seconds) => seconds.parse().ok(),
            seconds => seconds.as_u64(),
        };
        let expiry = seconds.and_then(|it| SystemTime::now().checked_add(Duration::from_secs(it)));
        Ok(Loaded::new(Credential::Bearer(issued.access_token), expiry))
    }
}

/// Key of a service account, as Google Cloud exports it.
#[derive(Deserialize)]
struct ServiceAccountKey {
    #[serde(rename = "type")]
    kind: Option<String>,
    client_email: Option<String>,
    private_key_id: Option<String>,
    private_key: Option<Secret>,
}

/// Signs a token with a service account's key. Google Cloud accepts such tokens themselves, without
/// an exchange (RFC 7523 and Google's AIP-4111).
pub(super) fn google_token(file: &Secret, path: &Path) -> Result<Loaded, StoreError> {
    let unusable = |reason: &str| denied(format!("{}: {reason}", path.display()));
    let key: ServiceAccountKey = serde_json::from_str(file.expose())
        .map_err(|_| unusable("not the JSON key of a service account"))?;
    let (Some(email), Some(key_id), Some(private_key)) =
        (key.client_email, key.private_key_id, key.private_key)
    else {
        let kind = key.kind.as_deref().map_or("unknown".into(), crate::response::quoted);
        return Err(unusable(&format!(
            "credentials of the type {kind} aren't supported, only service_account"
        )));
    };
    let der = PrivateKeyDer::from_pem_slice(private_key.expose().as_bytes())
        .map_err(|_| unusable("the private key isn't valid PEM"))?;
    let pair = match &der {
        PrivateKeyDer::Pkcs8(key) => RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).ok(),
        PrivateKeyDer::Pkcs1(key) => RsaKeyPair::from_der(key.secret_pkcs1_der()).ok(),
        _ => None,
    };
    let pair = pair.ok_or_else(|| unusable("the private key isn't a usable RSA key"))?;

    let now = SystemTime::now();
    let expiry = now + TOKEN_LIFETIME;
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs());
    let header = json!({ "alg": "RS256", "typ": "JWT", "kid": key_id });
    let claims = json!({
        "iss": email,
        "sub": email,
        "scope": GOOGLE_SCOPE,
        "iat": seconds(now),
        "exp": seconds(expiry),
    });
    let encode = |part: &serde_json::Value| URL_SAFE_NO_PAD.encode(part.to_string());
    let message = format!("{}.{}", encode(&header), encode(&claims));
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature)
        .map_err(|_| unusable("the private key can't sign"))?;
    let token = format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature));
    Ok(Loaded::new(Credential::Bearer(Secret::new(token)), Some(expiry)))
}
