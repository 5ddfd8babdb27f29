//! Protects the monitor by TLS and a token, which are in files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{AUTHORIZATION, HeaderMap};
use nbd_gateway::tls::{
    self, ServerTls, TlsFileError, TlsFileProblem, TlsFiles, TlsVersion, check_not_exposed,
};
use nbd_telemetry::escape;
use parking_lot::RwLock;
use rustls::ServerConfig;
use zeroize::Zeroizing;

use crate::exit_status::{self, ExitStatus};

/// Minimum length of a token, in characters. Nothing limits how often a token can be guessed.
const MIN_TOKEN_CHARS: usize = 16;

/// Maximum length of a token, in characters: more wouldn't fit into the head of a request.
const MAX_TOKEN_CHARS: usize = 1024;

/// Paths of the files that protect the monitor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MonitorAuthFiles {
    /// Certificate and key.
    pub(crate) tls: Option<TlsFiles>,
    /// File with the token.
    pub(crate) token: Option<PathBuf>,
}

impl MonitorAuthFiles {
    /// Returns the paths of all files.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.tls.iter().flat_map(TlsFiles::paths).chain(&self.token)
    }
}

/// What readers need to be admitted.
#[derive(Debug)]
pub(crate) struct MonitorAuth {
    files: MonitorAuthFiles,
    active: RwLock<Credentials>,
}

/// Content of the files.
#[derive(Debug, Clone)]
struct Credentials {
    tls: Option<ServerTls>,
    token: Option<Token>,
}

/// SHA-256 of a token.
#[derive(Debug, Clone)]
struct Token([u8; 32]);

/// A file that can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MonitorAuthError {
    #[error("can't use TLS for the monitor: {0}")]
    Tls(#[from] TlsFileError),
    #[error("can't use the token of the monitor: {}: {problem}", escape::path(.path))]
    Token { path: PathBuf, problem: TokenProblem },
}

/// Problem with a token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenProblem {
    #[error(transparent)]
    File(TlsFileProblem),
    #[error("it has fewer than {MIN_TOKEN_CHARS} characters: create one with openssl rand -hex 32")]
    TooShort,
    #[error("it has more than {MAX_TOKEN_CHARS} characters")]
    TooLong,
    #[error(
        "it has a space, or a character that isn't ASCII: create one with openssl rand -hex 32"
    )]
    InvalidCharacter,
}

impl ExitStatus for MonitorAuthError {
    fn exit_status(&self) -> u8 {
        exit_status::TLS
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Tls(error) => error.problem.label(),
            Self::Token { .. } => "monitor_token",
        }
    }
}

impl MonitorAuth {
    /// Reads the files.
    ///
    /// # Errors
    /// One of them can't be used.
    pub(crate) fn load(files: MonitorAuthFiles) -> Result<Self, MonitorAuthError> {
        let active = Credentials::load(&files, None)?;
        Ok(Self { files, active: RwLock::new(active) })
    }

    /// Reads the files again, for connections that are accepted from now on. Blocking.
    ///
    /// # Errors
    /// One of them can't be used; everything stays as it was.
    pub(crate) fn reload(&self) -> Result<(), MonitorAuthError> {
        let previous = self.active.read().clone();
        let read = Credentials::load(&self.files, Some(&previous))?;
        *self.active.write() = read;
        Ok(())
    }

    /// Returns true if connections use TLS, except those over Unix sockets.
    pub(crate) fn has_tls(&self) -> bool {
        self.files.tls.is_some()
    }

    /// Returns true if readers must present a token.
    pub(crate) fn has_token(&self) -> bool {
        self.files.token.is_some()
    }

    /// Returns the TLS configuration for a handshake; `None` without TLS.
    pub(super) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.active.read().tls.as_ref().map(|tls| Arc::clone(tls.config()))
    }

    /// Returns true if a request with these header fields is admitted: it has the token, or none is
    /// needed. The token may be a bearer token or the password of basic authentication, which
    /// browsers support.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        let active = self.active.read();
        let Some(token) = &active.token else { return true };
        let mut fields = headers.get_all(AUTHORIZATION).iter();
        let (Some(field), None) = (fields.next(), fields.next()) else { return false };
        presented_token(field.as_bytes()).is_some_and(|presented| token.is(&presented))
    }
}

impl Credentials {
    fn load(files: &MonitorAuthFiles, previous: Option<&Self>) -> Result<Self, MonitorAuthError> {
        let tls = match &files.tls {
            Some(files) => {
                let previous = previous.and_then(|it| it.tls.as_ref());
                let (tls, warnings) = tls::load(files, TlsVersion::V1_2, previous)?;
                for warning in warnings {
                    tracing::warn!(reason = warning.reason, "monitor: {warning}");
                }
                Some(tls)
            }
            None => None,
        };
        let token = match &files.token {
            Some(path) => {
                let failed = |problem| MonitorAuthError::Token { path: path.clone(), problem };
                let content =
                    read_token_file(path).map_err(|problem| failed(TokenProblem::File(problem)))?;
                Some(Token::parse(&content).map_err(failed)?)
            }
            None => None,
        };
        Ok(Self { tls, token })
    }
}

impl Token {
    /// Parses the content of a file, which may end with white space.
    fn parse(content: &[u8]) -> Result<Self, TokenProblem> {
        let token = content.trim_ascii_end();
        match token.len() {
            _ if !token.iter().all(u8::is_ascii_graphic) => Err(TokenProblem::InvalidCharacter),
            ..MIN_TOKEN_CHARS => Err(TokenProblem::TooShort),
            MIN_TOKEN_CHARS..=MAX_TOKEN_CHARS => Ok(Self(sha256(token))),
            _ => Err(TokenProblem::TooLong),
        }
    }

    /// Returns true if `presented` is this token. The time doesn't depend on where they differ.
    fn is(&self, presented: &[u8]) -> bool {
        verify_slices_are_equal(&self.0, &sha256(presented)).is_ok()
    }
}

/// Reads a file with a token, but not more than a token can have.
///
/// # Errors
/// It can't be read, or every user can read it.
pub(crate) fn read_token_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsFileProblem> {
    const MAX_FILE_BYTES: usize = MAX_TOKEN_CHARS + 64;
    // The permissions of a pipe, such as a shell's `<(…)`, mean nothing.
    if path.is_file() {
        check_not_exposed(path)?;
    }
    // Allocated at full size: growing would leave copies of the token in memory.
    let mut content = Zeroizing::new(Vec::with_capacity(MAX_FILE_BYTES + 1));
    File::open(path)?.take(MAX_FILE_BYTES as u64).read_to_end(&mut content)?;
    Ok(content)
}

/// Returns the token in a field `Authorization` (RFC 6750, 2.1; RFC 7617, 2).
fn presented_token(field: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let field = str::from_utf8(field).ok()?;
    let (scheme, rest) = field.split_once(' ')?;
    let rest = rest.trim_matches(' ');
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Zeroizing::new(rest.as_bytes().to_owned()));
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let pair = Zeroizing::new(STANDARD.decode(rest).ok()?);
        let colon = pair.iter().position(|byte| *byte == b':')?;
        return Some(Zeroizing::new(pair.get(colon + 1..)?.to_owned()));
    }
    None
}

fn sha256(text: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    // The lengths are equal.
    hash.copy_from_slice(digest(&SHA256, text).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn token_file(content: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        (folder, path)
    }

    fn auth(path: &Path) -> Result<MonitorAuth, MonitorAuthError> {
        MonitorAuth::load(MonitorAuthFiles { tls: None, token: Some(path.to_owned()) })
    }

    fn admits(auth: &MonitorAuth, fields: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(AUTHORIZATION, field.parse().unwrap());
        }
        auth.admits(&headers)
    }

    #[test]
    fn bearer_tokens_and_passwords_are_admitted() {
        let (_folder, path) = token_file("0123456789abcdef\n");
        let auth = auth(&path).unwrap();
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        for field in [
            format!("Bearer {TOKEN}"),
            format!("bearer  {TOKEN}"),
            basic(&format!("prometheus:{TOKEN}")),
            basic(&format!(":{TOKEN}")),
        ] {
            assert!(admits(&auth, &[&field]), "{field}");
        }
        for field in [
            "",
            "Bearer",
            "Bearer ",
            TOKEN,
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdef0",
            "Bearer 0123456789ABCDEF",
            "Digest 0123456789abcdef",
            "Basic 0123456789abcdef",
            &basic(TOKEN),
            &basic(&format!("{TOKEN}:")),
            &basic(&format!("a:b:{TOKEN}")),
        ] {
            assert!(!admits(&auth, &[field]), "{field}");
        }
        let good = format!("Bearer {TOKEN}");
        assert!(!admits(&auth, &[]) && !admits(&auth, &[&good, &good]));
        let open = MonitorAuth::load(MonitorAuthFiles::default()).unwrap();
        assert!(admits(&open, &[]));
    }

    #[test]
    fn weak_and_exposed_tokens_are_refused() {
        let long = "x".repeat(MAX_TOKEN_CHARS + 1);
        for content in
            ["", "\n", "0123456789abcde\n", "0123456789 abcdef", "0123456789abcdeé", &long]
        {
            let (_folder, path) = token_file(content);
            let error = auth(&path).unwrap_err();
            assert_eq!(error.label(), "monitor_token", "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().join("token");
        fs::write(&path, TOKEN).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let problem = read_token_file(&path).unwrap_err();
        assert!(matches!(problem, TlsFileProblem::Exposed { .. }), "{problem}");
    }

    #[test]
    fn a_reload_replaces_the_token_or_keeps_it() {
        let (_folder, path) = token_file(TOKEN);
        let auth = auth(&path).unwrap();
        fs::write(&path, "short").unwrap();
        auth.reload().unwrap_err();
        assert!(admits(&auth, &[&format!("Bearer {TOKEN}")]));
        fs::write(&path, "fedcba9876543210").unwrap();
        auth.reload().unwrap();
        assert!(!admits(&auth, &[&format!("Bearer {TOKEN}")]));
        assert!(admits(&auth, &["Bearer fedcba9876543210"]));
    }
}
