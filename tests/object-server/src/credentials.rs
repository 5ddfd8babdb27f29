//! Credentials, and who issues them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

/// Credentials of S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Name of the key, which requests state.
    pub access_key_id: String,
    /// Key with which requests are signed.
    pub secret_access_key: String,
    /// Token that requests have to carry, if the credentials are temporary.
    pub session_token: Option<String>,
    /// End of validity, if the credentials are temporary.
    pub expires: Option<SystemTime>,
}

impl Credentials {
    /// Creates credentials that don't expire.
    #[must_use]
    pub fn permanent(access_key_id: &str, secret_access_key: &str) -> Self {
        let (id, secret) = (access_key_id.to_owned(), secret_access_key.to_owned());
        Self { access_key_id: id, secret_access_key: secret, session_token: None, expires: None }
    }
}

/// Issues credentials and knows which ones are valid. Clones refer to the same issuer.
#[derive(Debug, Clone)]
pub struct Issuer(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    issued: HashMap<String, Credentials>,
    lifetime: Duration,
    next: u32,
}

impl Issuer {
    /// Creates an issuer of temporary credentials.
    #[must_use]
    pub fn new(lifetime: Duration) -> Self {
        Self(Arc::new(Mutex::new(State { issued: HashMap::new(), lifetime, next: 0 })))
    }

    /// Adds credentials that were not issued here, such as permanent ones.
    pub fn add(&self, credentials: Credentials) {
        self.0.lock().issued.insert(credentials.access_key_id.clone(), credentials);
    }

    /// Issues new temporary credentials.
    #[must_use]
    pub fn issue(&self) -> Credentials {
        let mut state = self.0.lock();
        state.next += 1;
        let number = state.next;
        let credentials = Credentials {
            access_key_id: format!("ASIATEST{number:08}"),
            secret_access_key: format!("secret/{number:08}+of+a+test"),
            session_token: Some(format!("session/token+{number:08}==")),
            expires: Some(SystemTime::now() + state.lifetime),
        };
        state.issued.insert(credentials.access_key_id.clone(), credentials.clone());
        credentials
    }

    /// Sets the lifetime of credentials issued from now on.
    pub fn set_lifetime(&self, lifetime: Duration) {
        self.0.lock().lifetime = lifetime;
    }

    /// Ends the validity of all temporary credentials, earlier than their holders expect.
    pub fn expire_all(&self) {
        for credentials in self.0.lock().issued.values_mut() {
            if credentials.session_token.is_some() {
                credentials.expires = Some(SystemTime::UNIX_EPOCH);
            }
        }
    }

    /// Returns the number of temporary credentials issued so far.
    #[must_use]
    pub fn issued(&self) -> u32 {
        self.0.lock().next
    }

    /// Finds valid credentials, or returns the status and error code of the refusal.
    pub(crate) fn find(
        &self,
        access_key_id: &str,
        session_token: Option<&str>,
    ) -> Result<Credentials, (u16, &'static str)> {
        let state = self.0.lock();
        let credentials = state.issued.get(access_key_id).ok_or((403, "InvalidAccessKeyId"))?;
        if credentials.session_token.as_deref() != session_token {
            return Err((400, "InvalidToken"));
        }
        if credentials.expires.is_some_and(|expires| expires <= SystemTime::now()) {
            return Err((400, "ExpiredToken"));
        }
        Ok(credentials.clone())
    }
}
