//! Credentials for S3, and the services of AWS that issue some: for web identities, containers and
//! instances.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use hyper::Request;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::credentials::{
    Credential, CredentialSource, Loaded, ResolvedSource, denied, read_secret,
};
use super::profile::Profile;
use super::{Environment, Secret};
use crate::http::{HttpClient, is_loopback};
use crate::response::{check_failure, xml_text};
use crate::store::{StoreError, StoreErrorKind};

/// Address of the instance metadata service.
const METADATA: &str = "http://169.254.169.254";
/// Address of the credentials service of ECS.
const CONTAINER: &str = "http://169.254.170.2";
/// Addresses without TLS that may be asked for a container's credentials: ECS and EKS.
const CONTAINER_HOSTS: [&str; 3] = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];
/// Lifetime of a session with the instance metadata service, in seconds.
const METADATA_SESSION: &str = "21600";
/// Maximum size of a response with credentials, in bytes.
const MAX_RESPONSE: usize = 64 * 1024;

/// Chooses the source of the credentials.
pub(super) fn resolve(
    source: &CredentialSource,
    environment: &Environment,
    region: &str,
) -> Result<ResolvedSource, String> {
    match source {
        CredentialSource::Anonymous => Ok(ResolvedSource::fixed(Credential::Anonymous)),
        CredentialSource::Environment => from_environment(environment)?
            .ok_or_else(|| "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY aren't set".to_owned()),
        CredentialSource::WebIdentity => web_identity(environment, region)
            .ok_or_else(|| "AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN aren't set".to_owned()),
        CredentialSource::Instance => {
            let endpoint = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT");
            let endpoint = endpoint.unwrap_or(METADATA).trim_end_matches('/').to_owned();
            Ok(ResolvedSource::AwsService(AwsCredentialService::Instance { endpoint }))
        }
        CredentialSource::File(path) => {
            let profile = Profile::in_file(path, environment);
            profile.load().map_err(|error| error.message)?;
            Ok(ResolvedSource::AwsProfile(profile))
        }
        CredentialSource::Auto => automatic(environment, region),
    }
}

fn automatic(environment: &Environment, region: &str) -> Result<ResolvedSource, String> {
    if let Some(source) = from_environment(environment)? {
        return Ok(source);
    }
    if let Some(source) = web_identity(environment, region) {
        return Ok(source);
    }
    let profile = Profile::of(environment);
    if environment.get("AWS_PROFILE").is_some() || profile.exists() {
        profile.load().map_err(|error| error.message)?;
        return Ok(ResolvedSource::AwsProfile(profile));
    }
    if let Some(service) = container(environment)? {
        return Ok(ResolvedSource::AwsService(service));
    }
    Err("no AWS credentials found in the environment, in ~/.aws/credentials or for this container: \
         name a file with them, or choose `instance` (an EC2 instance's role) or `anonymous` (a \
         public bucket)"
        .to_owned())
}

fn from_environment(environment: &Environment) -> Result<Option<ResolvedSource>, String> {
    let key_id = environment.get("AWS_ACCESS_KEY_ID");
    let secret_key = environment.get("AWS_SECRET_ACCESS_KEY");
    match (key_id, secret_key) {
        (Some(key_id), Some(secret_key)) => Ok(Some(ResolvedSource::fixed(Credential::Aws {
            key_id: key_id.to_owned(),
            secret_key: Secret::new(secret_key),
            session_token: environment.get("AWS_SESSION_TOKEN").map(Secret::new),
        }))),
        (None, None) => Ok(None),
        (Some(_), None) => Err("AWS_ACCESS_KEY_ID is set without AWS_SECRET_ACCESS_KEY".to_owned()),
        (None, Some(_)) => Err("AWS_SECRET_ACCESS_KEY is set without AWS_ACCESS_KEY_ID".to_owned()),
    }
}

fn web_identity(environment: &Environment, region: &str) -> Option<ResolvedSource> {
    let token_file = PathBuf::from(environment.get("AWS_WEB_IDENTITY_TOKEN_FILE")?);
    let role = environment.get("AWS_ROLE_ARN")?.to_owned();
    let session = environment.get("AWS_ROLE_SESSION_NAME").unwrap_or("object-reader").to_owned();
    let endpoint = environment.get("AWS_ENDPOINT_URL_STS").map_or_else(
        || format!("https://sts.{region}.{}", domain(region)),
        |endpoint| endpoint.trim_end_matches('/').to_owned(),
    );
    Some(ResolvedSource::AwsService(AwsCredentialService::WebIdentity {
        endpoint,
        token_file,
        role,
        session,
    }))
}

fn container(environment: &Environment) -> Result<Option<AwsCredentialService>, String> {
    let url = if let Some(path) = environment.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") {
        format!("{CONTAINER}{path}")
    } else if let Some(url) = environment.get("AWS_CONTAINER_CREDENTIALS_FULL_URI") {
        url.to_owned()
    } else {
        return Ok(None);
    };
    let uri: hyper::Uri =
        url.parse().map_err(|_| "AWS_CONTAINER_CREDENTIALS_FULL_URI isn't a URL".to_owned())?;
    let host = uri.host().unwrap_or("").trim_start_matches('[').trim_end_matches(']');
    let is_local = is_loopback(host)
        || CONTAINER_HOSTS.iter().any(|known| known.parse::<IpAddr>().ok() == host.parse().ok());
    if uri.scheme_str() != Some("https") && !is_local {
        return Err(format!("credentials of a container aren't requested from {host} without TLS"));
    }
    let token = environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN").map(Secret::new);
    let token_file = environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").map(PathBuf::from);
    Ok(Some(AwsCredentialService::Container { url, token, token_file }))
}

/// Returns the domain of AWS in a region.
pub(super) fn domain(region: &str) -> &'static str {
    if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" }
}

/// Returns the region from the environment or the profile.
pub(super) fn region(environment: &Environment) -> Option<String> {
    let from_environment =
        environment.get("AWS_REGION").or_else(|| environment.get("AWS_DEFAULT_REGION"));
    from_environment.map(str::to_owned).or_else(|| Profile::of(environment).region())
}

/// Service that issues temporary credentials.
pub(super) enum AwsCredentialService {
    /// The security token service.
    WebIdentity { endpoint: String, token_file: PathBuf, role: String, session: String },
    /// The credentials service of a container.
    Container { url: String, token: Option<Secret>, token_file: Option<PathBuf> },
    /// The instance metadata service, version 2.
    Instance { endpoint: String },
}

/// Credentials in the JSON of containers and instances.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct IssuedCredentials {
    access_key_id: String,
    secret_access_key: Secret,
    token: Option<Secret>,
    expiration: Option<String>,
}

impl AwsCredentialService {
    /// Describes the service. The URL of a container's service is a secret.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::WebIdentity { token_file, role, .. } => {
                format!("the web identity in {}, for the role {role}", token_file.display())
            }
            Self::Container { .. } => "the container's credentials service".to_owned(),
            Self::Instance { .. } => "the instance metadata service".to_owned(),
        }
    }

    /// Returns the URL of the service.
    pub(super) fn url(&self) -> &str {
        match self {
            Self::WebIdentity { endpoint, .. } | Self::Instance { endpoint } => endpoint,
            Self::Container { url, .. } => url,
        }
    }

    /// Returns the file with the token that is exchanged for credentials.
    pub(super) fn token_file(&self) -> Option<&Path> {
        match self {
            Self::WebIdentity { token_file, .. } => Some(token_file),
            Self::Container { token_file, .. } => token_file.as_deref(),
            Self::Instance { .. } => None,
        }
    }

    pub(super) async fn load(&self, client: &HttpClient) -> Result<Loaded, StoreError> {
        match self {
            Self::WebIdentity { endpoint, token_file, role, session } => {
                let token = read_secret(token_file)?;
                let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
                let form = format!(
                    "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn={}\
                     &RoleSessionName={}&WebIdentityToken={}",
                    encode(role),
                    encode(session),
                    encode(token.expose().trim()),
                );
                let request = Request::post(format!("{endpoint}/"))
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(Bytes::from(form));
                let body = exchange(client, request, "the security token service", false).await?;
                let xml = String::from_utf8_lossy(&body);
                let text = |name| xml_text(&xml, name);
                let (Some(key_id), Some(secret_key), Some(token)) =
                    (text("AccessKeyId"), text("SecretAccessKey"), text("SessionToken"))
                else {
                    return Err(denied("the security token service's response has no credentials"));
                };
                let credential = Credential::Aws {
                    key_id: key_id.to_owned(),
                    secret_key: Secret::new(secret_key),
                    session_token: Some(Secret::new(token)),
                };
                Ok(Loaded::new(credential, text("Expiration").and_then(parse_time)))
            }
            Self::Container { url, token, token_file } => {
                let token = match token_file {
                    Some(path) => Some(read_secret(path)?),
                    None => token.clone(),
                };
                let mut request = Request::get(url);
                if let Some(token) = token {
                    request = request.header(AUTHORIZATION, sensitive(token.expose().trim())?);
                }
                let request = request.body(Bytes::new());
                issued(
                    &exchange(client, request, "the container's credentials service", true).await?,
                )
            }
            Self::Instance { endpoint } => {
                let request = Request::put(format!("{endpoint}/latest/api/token"))
                    .header("x-aws-ec2-metadata-token-ttl-seconds", METADATA_SESSION)
                    .body(Bytes::new());
                let service = "the instance metadata service";
                let session = exchange(client, request, service, true).await?;
                let session = sensitive(String::from_utf8_lossy(&session).trim())?;
                let path = format!("{endpoint}/latest/meta-data/iam/security-credentials/");
                let get = |url: &str| {
                    let header = ("x-aws-ec2-metadata-token", session.clone());
                    Request::get(url).header(header.0, header.1).body(Bytes::new())
                };
                let roles = exchange(client, get(&path), service, true).await?;
                let roles = String::from_utf8_lossy(&roles).into_owned();
                let Some(role) = roles.lines().next().filter(|role| !role.trim().is_empty()) else {
                    return Err(denied("this instance has no IAM role"));
                };
                let url = format!("{path}{}", crate::url::encode_path(role.trim()));
                issued(&exchange(client, get(&url), service, true).await?)
            }
        }
    }
}

fn issued(json: &[u8]) -> Result<Loaded, StoreError> {
    // The parser's own message might quote secrets.
    let issued: IssuedCredentials = serde_json::from_slice(json)
        .map_err(|_| denied("the response with AWS credentials isn't the expected JSON"))?;
    let expiry = issued.expiration.as_deref().and_then(parse_time);
    let credential = Credential::Aws {
        key_id: issued.access_key_id,
        secret_key: issued.secret_access_key,
        session_token: issued.token,
    };
    Ok(Loaded::new(credential, expiry))
}

fn parse_time(time: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339_weak(time).ok()
}

/// Returns a header value that isn't shown by `Debug`.
pub(super) fn sensitive(value: &str) -> Result<HeaderValue, StoreError> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| denied("a token contains characters that can't be sent in a header"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Sends a request to a service that issues credentials, and returns the body of its response.
pub(super) async fn exchange(
    client: &HttpClient,
    request: Result<Request<Bytes>, hyper::http::Error>,
    service: &str,
    is_metadata: bool,
) -> Result<Bytes, StoreError> {
    let request = request.map_err(|_| denied(format!("the URL of {service} is invalid")))?;
    let response = match is_metadata {
        true => client.send_to_metadata_service(request, MAX_RESPONSE).await,
        false => client.send(request, MAX_RESPONSE).await,
    };
    let in_context = |mut error: StoreError| {
        error.message = format!("{service}: {}", error.message);
        error
    };
    let response = response.map_err(in_context)?;
    if response.status.is_success() && !response.is_truncated {
        return Ok(response.body);
    }
    let mut error = check_failure(&response, false, SystemTime::now());
    if !error.kind.is_transient() && error.kind != StoreErrorKind::ClockSkew {
        error.kind = StoreErrorKind::Denied;
    }
    Err(in_context(error))
}
