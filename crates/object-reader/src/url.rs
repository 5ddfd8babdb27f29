//! URLs of objects and folders in stores.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::stores::Secret;

/// Maximum length of a key, in bytes: that of S3 and Azure.
const MAX_KEY: usize = 1024;

/// Characters of a path that are sent encoded. `+` is one of them, since S3 takes a plain one for a
/// space; all servers decode an encoded one.
const ENCODED_IN_PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'!')
    .remove(b'$')
    .remove(b'&')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')')
    .remove(b'*')
    .remove(b',')
    .remove(b';')
    .remove(b'=')
    .remove(b':')
    .remove(b'@');

/// Kind of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Amazon S3 or a compatible store, `s3://BUCKET/KEY`.
    S3,
    /// Google Cloud Storage, `gs://BUCKET/KEY`.
    Gcs,
    /// Azure Blob Storage, `az://CONTAINER/KEY`.
    Azure,
    /// HTTP server without TLS.
    Http,
    /// HTTP server.
    Https,
}

impl Scheme {
    const ALL: [Self; 5] = [Self::S3, Self::Gcs, Self::Azure, Self::Http, Self::Https];

    /// Returns the scheme as in a URL, without the colon.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub(crate) fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Https)
    }
}

/// URL of a store: a bucket, a container or an HTTP server. `Display` and `Debug` show no secrets.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct StoreUrl {
    scheme: Scheme,
    /// Bucket, container, or host without brackets.
    host: String,
    /// Port of an HTTP server, unless it is the scheme's default.
    port: Option<u16>,
    /// Query that is sent with each request to an HTTP server.
    query: Option<Secret>,
}

impl StoreUrl {
    /// Returns the kind of the store.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the bucket, the container, or the host without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the port of an HTTP server, which may be the default one.
    pub fn port(&self) -> Option<u16> {
        match self.scheme {
            Scheme::Http => Some(self.port.unwrap_or(80)),
            Scheme::Https => Some(self.port.unwrap_or(443)),
            _ => None,
        }
    }

    /// Returns the query of the URL, such as a signature, which is sent with each request.
    pub fn query(&self) -> Option<&Secret> {
        self.query.as_ref()
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), bracketed(&self.host))?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// URL of an object, or of a folder if it ends in a slash. `Display` and `Debug` show no secrets.
///
/// Keys of `s3`, `gs` and `az` URLs are literal, as they are for the vendors' command lines: `%20`
/// is not a space there. In `http` and `https` URLs it is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ObjectUrl {
    store: StoreUrl,
    key: String,
}

impl ObjectUrl {
    /// Returns true if `text` starts with the scheme of a store, and is therefore not a file name.
    pub fn has_scheme(text: &str) -> bool {
        split_scheme(text).is_some()
    }

    /// Returns the store.
    pub fn store(&self) -> &StoreUrl {
        &self.store
    }

    /// Returns the decoded key, without a leading slash. The key of a folder is empty or ends in a
    /// slash.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns true if the URL is that of a folder.
    pub fn is_folder(&self) -> bool {
        self.key.is_empty() || self.key.ends_with('/')
    }

    /// Returns the last component of the key.
    pub fn name(&self) -> &str {
        let key = self.key.trim_end_matches('/');
        key.rsplit_once('/').map_or(key, |(_, name)| name)
    }

    /// Returns the URL of the object `name` in this folder, or beside this object.
    ///
    /// # Errors
    /// `name` is empty, contains a slash or a control character, or is `.` or `..`.
    pub fn with_name(&self, name: &str) -> Result<Self, UrlError> {
        if name.is_empty() || name.contains('/') {
            return Err(UrlError("the name of an object is empty or contains a slash".to_owned()));
        }
        let folder = self.key.rsplit_once('/').map_or("", |(folder, _)| folder);
        let separator = if folder.is_empty() { "" } else { "/" };
        let key = format!("{folder}{separator}{name}");
        check_key(&key)?;
        Ok(Self { store: self.store.clone(), key })
    }
}

impl fmt::Display for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.store.scheme.is_http() {
            write!(f, "{}/{}", self.store, encode_path(&self.key))
        } else {
            write!(f, "{}/{}", self.store, self.key)
        }
    }
}

impl fmt::Debug for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Reason why a URL can't be used. It doesn't repeat the URL, which may contain secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UrlError(String);

impl FromStr for ObjectUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let Some((scheme, rest)) = split_scheme(text) else {
            return refuse("the URL doesn't start with s3://, gs://, az://, https:// or http://");
        };
        if rest.chars().any(char::is_control) {
            return refuse("the URL contains a control character");
        }
        if rest.contains('#') {
            return refuse("the URL contains a fragment; encode a # of a name as %23");
        }
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            return refuse(
                "the URL contains a user name or a password: remove them, and put credentials into \
                 a file that the credentials option names",
            );
        }
        let (store, key) = if scheme.is_http() {
            let (host, port) = parse_authority(authority)?;
            let query = match query {
                Some(query) => Some(Secret::new(checked_query(query)?)),
                None => None,
            };
            let default_port = if scheme == Scheme::Http { 80 } else { 443 };
            let port = port.filter(|port| *port != default_port);
            (StoreUrl { scheme, host, port, query }, decode_path(path)?)
        } else {
            if query.is_some() {
                return refuse(
                    "a query isn't supported in this URL: for a presigned URL use https://",
                );
            }
            check_bucket(authority)?;
            let host = authority.to_owned();
            (StoreUrl { scheme, host, port: None, query: None }, path.to_owned())
        };
        check_key(&key)?;
        Ok(Self { store, key })
    }
}

fn refuse<T>(reason: &str) -> Result<T, UrlError> {
    Err(UrlError(reason.to_owned()))
}

fn split_scheme(text: &str) -> Option<(Scheme, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let scheme = Scheme::ALL.into_iter().find(|it| it.as_str().eq_ignore_ascii_case(scheme))?;
    Some((scheme, rest))
}

/// Splits `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`. The host is returned in lower case and
/// without brackets.
pub(crate) fn parse_authority(authority: &str) -> Result<(String, Option<u16>), UrlError> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let Some((host, port)) = rest.split_once(']') else {
            return refuse("the bracket of the IPv6 address isn't closed");
        };
        if host.parse::<Ipv6Addr>().is_err() {
            return refuse("the brackets don't contain an IPv6 address");
        }
        match port.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if port.is_empty() => (host, None),
            None => return refuse("the IPv6 address is followed by something other than a port"),
        }
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let is_valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    if host.is_empty() || host.len() > 253 || !host.chars().all(is_valid) {
        return refuse("the host isn't a name or an IP address");
    }
    let port = match port {
        None => None,
        Some(port) => match port.parse::<u16>() {
            Ok(number) if number != 0 && port.bytes().all(|b| b.is_ascii_digit()) => Some(number),
            _ => return refuse("the port isn't a number from 1 to 65535"),
        },
    };
    Ok((host.to_ascii_lowercase(), port))
}

/// Returns `host` with brackets if it is an IPv6 address.
pub(crate) fn bracketed(host: &str) -> String {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => host.to_owned(),
    }
}

fn check_bucket(bucket: &str) -> Result<(), UrlError> {
    let is_valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_name = (1..=222).contains(&bucket.len()) && bucket.chars().all(is_valid);
    if is_name && bucket.chars().any(|c| c.is_ascii_alphanumeric()) {
        Ok(())
    } else {
        refuse("the bucket or container isn't a name of letters, digits, dots and hyphens")
    }
}

/// Returns `query` as it can be sent.
fn checked_query(query: &str) -> Result<&str, UrlError> {
    if query.is_ascii() && !query.contains([' ', '"', '<', '>', '\\', '^', '`', '{', '|', '}']) {
        Ok(query)
    } else {
        refuse("the query contains characters that must be percent-encoded")
    }
}

/// Returns an error if a key is too long or has components that could be taken for others.
pub(crate) fn check_key(key: &str) -> Result<(), UrlError> {
    if key.len() > MAX_KEY {
        return Err(UrlError(format!("the key is longer than {MAX_KEY} bytes")));
    }
    if key.chars().any(char::is_control) {
        return refuse("the key contains a control character");
    }
    if key.split('/').any(|part| part == "." || part == "..") {
        return refuse("the key contains . or .. as a component");
    }
    let components = key.strip_suffix('/').unwrap_or(key);
    if key.starts_with('/') || (!components.is_empty() && components.split('/').any(str::is_empty))
    {
        return refuse("the key contains an empty component: two slashes in a row");
    }
    Ok(())
}

fn decode_path(path: &str) -> Result<String, UrlError> {
    let mut rest = path;
    while let Some((_, after)) = rest.split_once('%') {
        match after.get(..2) {
            Some(digits) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
                if digits.eq_ignore_ascii_case("2f") {
                    return refuse("an encoded slash (%2F) in the path isn't supported");
                }
            }
            _ => return refuse("a % isn't followed by two digits; encode a % of a name as %25"),
        }
        rest = after;
    }
    match percent_decode_str(path).decode_utf8() {
        Ok(key) => Ok(key.into_owned()),
        Err(_) => refuse("the percent-encoded path isn't UTF-8"),
    }
}

/// Encodes a key for the path of an HTTP request.
pub(crate) fn encode_path(key: &str) -> String {
    utf8_percent_encode(key, ENCODED_IN_PATH).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ObjectUrl {
        text.parse().unwrap()
    }

    #[test]
    fn urls_are_split_into_store_and_key() {
        for (text, store, key, shown) in [
            ("s3://golden/v7/web.hxz", "s3://golden", "v7/web.hxz", "s3://golden/v7/web.hxz"),
            ("s3://golden", "s3://golden", "", "s3://golden/"),
            ("s3://golden/", "s3://golden", "", "s3://golden/"),
            ("s3://golden/v7/", "s3://golden", "v7/", "s3://golden/v7/"),
            ("gs://b.c/a%20b +ü", "gs://b.c", "a%20b +ü", "gs://b.c/a%20b +ü"),
            ("az://c/k", "az://c", "k", "az://c/k"),
            (
                "https://H.example/a%20b%2Bc%25/+ü",
                "https://h.example",
                "a b+c%/+ü",
                "https://h.example/a%20b%2Bc%25/%2B%C3%BC",
            ),
            ("https://h:8443/k", "https://h:8443", "k", "https://h:8443/k"),
            ("http://[::1]:80/k?sig=s3cret", "http://[::1]", "k", "http://[::1]/k"),
            ("HTTPS://h/?q", "https://h", "", "https://h/"),
            ("https://h/a?b=c?d/e", "https://h", "a", "https://h/a"),
        ] {
            let url = parse(text);
            assert_eq!(url.store().to_string(), store, "{text}");
            assert_eq!(url.key(), key, "{text}");
            assert_eq!(url.to_string(), shown, "{text}");
            assert_eq!(format!("{url:?}"), shown, "{text}");
        }
    }

    #[test]
    fn unusable_urls_are_rejected_without_repeating_them() {
        for text in [
            "file:///etc/passwd",
            "s3:/b/k",
            "s3://",
            "s3:///k",
            "s3://-/k",
            "s3://b/a//b",
            "s3://b//a",
            "s3://b/a//",
            "s3://b/../k",
            "s3://b/a/./k",
            "s3://b/k?versionId=1",
            "s3://b/k#1",
            "s3://b/a\nb",
            "https://user:hunter2@h/k",
            "https://h/%2e%2e/k",
            "https://h/a%2Fb",
            "https://h/a%2",
            "https://h/a%zz",
            "https://h/%ff",
            "https://h/%00",
            "https://h:0/k",
            "https://h:+1/k",
            "https://h:65536/k",
            "https://[::1/k",
            "https://[::1]x/k",
            "https://a b/k",
            "https:///k",
            "https://h/k?a b",
        ] {
            let error = text.parse::<ObjectUrl>().unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{text}: {error}");
        }
        assert!(format!("s3://b/{}", "k".repeat(1025)).parse::<ObjectUrl>().is_err());
    }

    #[test]
    fn queries_are_kept_but_not_shown() {
        let url = parse("https://h/k?X-Amz-Signature=s3cret");
        assert_eq!(url.store().query().map(Secret::expose), Some("X-Amz-Signature=s3cret"));
        assert!(!format!("{url} {url:?} {} {:?}", url.store(), url.store()).contains("s3cret"));
        assert_ne!(url.store(), parse("https://h/k").store());
    }

    #[test]
    fn names_are_resolved_beside_objects_and_in_folders() {
        assert_eq!(parse("s3://b/v7/web").with_name("base").unwrap().key(), "v7/base");
        assert_eq!(parse("s3://b/v7/").with_name("base").unwrap().key(), "v7/base");
        assert_eq!(parse("s3://b/web").with_name("base").unwrap().key(), "base");
        assert_eq!(parse("s3://b/v7/").name(), "v7");
        for name in ["", "..", ".", "a/b", "a\0"] {
            assert!(parse("s3://b/web").with_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn default_ports_depend_on_the_scheme() {
        assert_eq!(parse("https://h/").store().port(), Some(443));
        assert_eq!(parse("http://h/").store().port(), Some(80));
        assert_eq!(parse("s3://h/").store().port(), None);
    }
}
