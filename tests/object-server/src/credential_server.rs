//! The endpoints from which programs in AWS obtain credentials.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::answer::Answer;
use crate::credentials::{Credentials, Issuer};
use crate::encoding::{escape, iso_date, query_pairs};
use crate::frontend::{Frontend, Respond};
use crate::log::{LoggedRequest, RequestLog};
use crate::script::{Behavior, Script};

const CONTAINER: &str = "/v2/credentials";
const METADATA: &str = "/latest/meta-data/";
const METADATA_TOKEN: &str = "/latest/api/token";
const METADATA_CREDENTIALS: &str = "iam/security-credentials/";
const ROLE: &str = "test-role";
/// Session token of the metadata service.
const SESSION: &str = "metadata-session-token";

/// A server for temporary credentials, over plain HTTP:
///
/// - containers (ECS, EKS pod identity): [`Self::container_url`];
/// - instances (IMDSv2): [`Self::endpoint`]; IMDSv1 is refused with 401;
/// - web identities (STS, AssumeRoleWithWebIdentity): [`Self::endpoint`].
pub struct CredentialServer {
    frontend: Frontend,
    responder: Arc<Responder>,
}

struct Responder {
    issuer: Issuer,
    /// Required Authorization header of the container endpoint.
    authorization: Mutex<Option<String>>,
    /// Required token of AssumeRoleWithWebIdentity.
    web_identity: Mutex<Option<String>>,
}

impl CredentialServer {
    /// Starts a server on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// The system refused a socket or a thread.
    pub fn start(issuer: &Issuer) -> io::Result<Self> {
        let responder = Arc::new(Responder {
            issuer: issuer.clone(),
            authorization: Mutex::default(),
            web_identity: Mutex::default(),
        });
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let frontend = Frontend::start(address, Arc::clone(&responder) as _, None)?;
        Ok(Self { frontend, responder })
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.frontend.address()
    }

    /// Returns the value for `AWS_EC2_METADATA_SERVICE_ENDPOINT` and `AWS_ENDPOINT_URL_STS`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Returns the value for `AWS_CONTAINER_CREDENTIALS_FULL_URI`.
    #[must_use]
    pub fn container_url(&self) -> String {
        self.endpoint() + CONTAINER
    }

    /// Sets the Authorization header that the container endpoint requires from now on.
    pub fn require_authorization(&self, value: &str) {
        *self.responder.authorization.lock() = Some(value.to_owned());
    }

    /// Sets the web identity token that STS requires from now on.
    pub fn require_web_identity(&self, token: &str) {
        *self.responder.web_identity.lock() = Some(token.to_owned());
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
}

impl std::fmt::Debug for CredentialServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "credential server at {}", self.endpoint())
    }
}

impl Responder {
    fn container(&self, request: &LoggedRequest) -> Answer {
        match &*self.authorization.lock() {
            Some(required) if request.header("authorization") != Some(required) => {
                Answer::error(401, "Unauthorized")
            }
            _ => Answer::text(200, "application/json", json(&self.issuer.issue())),
        }
    }

    fn metadata(&self, name: &str, request: &LoggedRequest) -> Answer {
        if request.header("x-aws-ec2-metadata-token") != Some(SESSION) {
            return Answer::error(401, "Unauthorized");
        }
        match name.strip_prefix(METADATA_CREDENTIALS) {
            Some("") => Answer::text(200, "text/plain", ROLE),
            Some(ROLE) => Answer::text(200, "application/json", json(&self.issuer.issue())),
            _ if name == "placement/region" => Answer::text(200, "text/plain", "us-east-1"),
            _ => Answer::error(404, "NotFound"),
        }
    }

    /// Responds to AssumeRoleWithWebIdentity, with parameters in the query or in the body.
    fn security_token(&self, request: &LoggedRequest, body: &Bytes) -> Answer {
        let mut parameters = query_pairs(&request.query);
        parameters.extend(query_pairs(&String::from_utf8_lossy(body)));
        let parameter = |wanted: &str| {
            parameters.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
        };
        if parameter("Action") != Some("AssumeRoleWithWebIdentity") {
            return Answer::error(400, "InvalidAction");
        }
        let names = ["RoleArn", "RoleSessionName", "WebIdentityToken"];
        if names.iter().any(|name| parameter(name).unwrap_or_default().is_empty()) {
            return Answer::error(400, "MissingParameter");
        }
        let required = self.web_identity.lock().clone();
        if required.is_some() && required.as_deref() != parameter("WebIdentityToken") {
            return Answer::error(400, "ExpiredTokenException");
        }
        let credentials = self.issuer.issue();
        let xml = format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\
             \"><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{}</AccessKeyId>\
             <SecretAccessKey>{}</SecretAccessKey><SessionToken>{}</SessionToken><Expiration>{}\
             </Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
             </AssumeRoleWithWebIdentityResponse>",
            escape(&credentials.access_key_id),
            escape(&credentials.secret_access_key),
            escape(credentials.session_token.as_deref().unwrap_or_default()),
            expiration(&credentials)
        );
        Answer::text(200, "text/xml", xml)
    }
}

impl Respond for Responder {
    fn respond(&self, request: &LoggedRequest, body: &Bytes, _: &Behavior) -> Answer {
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", CONTAINER) => self.container(request),
            ("PUT", METADATA_TOKEN) => {
                let ttl = "x-aws-ec2-metadata-token-ttl-seconds";
                match request.header(ttl) {
                    Some(seconds) => Answer::text(200, "text/plain", SESSION).with(ttl, seconds),
                    None => Answer::error(400, "BadRequest"),
                }
            }
            ("GET" | "POST", "/") => self.security_token(request, body),
            ("GET", path) => match path.strip_prefix(METADATA) {
                Some(name) => self.metadata(name, request),
                None => Answer::error(404, "NotFound"),
            },
            _ => Answer::error(405, "MethodNotAllowed"),
        }
    }
}

/// Formats credentials as the container and metadata endpoints do.
fn json(credentials: &Credentials) -> String {
    format!(
        "{{\"Code\":\"Success\",\"Type\":\"AWS-HMAC\",\"LastUpdated\":\"{}\",\"AccessKeyId\":\
         \"{}\",\"SecretAccessKey\":\"{}\",\"Token\":\"{}\",\"Expiration\":\"{}\"}}",
        iso_date(SystemTime::now()),
        credentials.access_key_id,
        credentials.secret_access_key,
        credentials.session_token.as_deref().unwrap_or_default(),
        expiration(credentials)
    )
}

fn expiration(credentials: &Credentials) -> String {
    credentials.expires.map(iso_date).unwrap_or_default()
}
