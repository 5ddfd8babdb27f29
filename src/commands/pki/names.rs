//! Names for certificates: classifies and validates names given by users, and derives folder names.
//! Does no I/O.

use std::fmt;
use std::net::IpAddr;

use aws_lc_rs::digest;
use nbd_telemetry::{Hex, escape};
use rustls::pki_types::DnsName;

use crate::cli::values::{MAX_COMMON_NAME_CHARS, check_characters, validate_common_name};

/// Maximum length of a folder name in bytes before it is cut and a hash appended; file systems
/// allow 255 bytes.
const MAX_FOLDER_NAME_BYTES: usize = 160;
const HASH_BYTES: usize = 16;

/// A name in a certificate, by the form that it takes there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum SubjectName {
    Dns(String),
    Ip(IpAddr),
    Email(String),
    Uri(String),
    /// The subject's common name only.
    CommonName(String),
}

impl SubjectName {
    /// Parses the name of a server: a DNS name or an address.
    pub(crate) fn parse_server(text: &str) -> Result<Self, String> {
        check_characters(text)?;
        if let Ok(address) = text.parse() {
            return Ok(Self::Ip(address));
        }
        let host = text.strip_prefix("*.").unwrap_or(text);
        if is_dns_name(host) {
            return Ok(Self::Dns(text.to_owned()));
        }
        let advice = if text.is_ascii() {
            "a server's name must be a DNS name or an IP address, without a port"
        } else {
            "write an internationalized name in its ASCII form, which begins with xn--"
        };
        Err(advice.to_owned())
    }

    /// Parses the name of a client: an address, a URI, an e-mail address, a DNS name with a dot in
    /// it, or else any text.
    pub(crate) fn parse_client(text: &str) -> Result<Self, String> {
        check_characters(text)?;
        if let Ok(address) = text.parse() {
            Ok(Self::Ip(address))
        } else if looks_like_uri(text) {
            check_uri(text)?;
            Ok(Self::Uri(text.to_owned()))
        } else if text.contains('@') {
            check_email(text)?;
            Ok(Self::Email(text.to_owned()))
        } else if text.contains('.') && is_dns_name(text) {
            Ok(Self::Dns(text.to_owned()))
        } else {
            validate_common_name(text).map(Self::CommonName)
        }
    }

    /// Returns true if the name fits into a subject's common name.
    pub(super) fn fits_common_name(&self) -> bool {
        self.to_string().chars().count() <= MAX_COMMON_NAME_CHARS
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Dns(_) => "dns",
            Self::Ip(_) => "ip",
            Self::Email(_) => "email",
            Self::Uri(_) => "uri",
            Self::CommonName(_) => "cn",
        }
    }

    /// Returns the folder's name, which is different for each name. It contains only characters
    /// without special meaning in a shell, a URI and qemu's options. All other bytes are written as
    /// `=` and two hexadecimal digits, as in quoted-printable.
    pub(super) fn folder_name(&self) -> String {
        let text = self.to_string();
        let mut folder = String::new();
        for (at, byte) in text.bytes().enumerate() {
            let plain = byte.is_ascii_alphanumeric()
                || matches!(byte, b'_' | b'@')
                || (matches!(byte, b'.' | b'-') && at > 0);
            if plain {
                folder.push(char::from(byte));
            } else {
                folder += &format!("={byte:02X}");
            }
        }
        if folder.len() > MAX_FOLDER_NAME_BYTES {
            let hash = digest::digest(&digest::SHA256, text.as_bytes());
            folder.truncate(MAX_FOLDER_NAME_BYTES);
            // In complete names a digit follows each `=`, so none of them can look like this.
            folder += "==";
            folder += &Hex(hash.as_ref().get(..HASH_BYTES).unwrap_or_default()).to_string();
        }
        folder
    }
}

impl fmt::Display for SubjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Dns(text) | Self::Email(text) | Self::Uri(text) | Self::CommonName(text) => {
                f.write_str(text)
            }
        }
    }
}

/// Escapes a name for a terminal; it may come from an untrusted source.
pub(super) fn escape_name(name: &SubjectName) -> String {
    escape::text(&name.to_string()).into_owned()
}

fn is_dns_name(text: &str) -> bool {
    !text.ends_with('.') && DnsName::try_from(text).is_ok()
}

fn looks_like_uri(text: &str) -> bool {
    text.contains("://") || text.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("urn:"))
}

fn check_uri(text: &str) -> Result<(), String> {
    let (scheme, rest) = text.split_once(':').unwrap_or_default();
    let good_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    let good_rest =
        rest.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte));
    if good_scheme && good_rest && !rest.trim_start_matches('/').is_empty() {
        Ok(())
    } else {
        Err("not a valid URI, such as spiffe://example.org/backup".to_owned())
    }
}

fn check_email(text: &str) -> Result<(), String> {
    let (mailbox, domain) = text.rsplit_once('@').unwrap_or_default();
    let good_mailbox = !mailbox.is_empty()
        && mailbox
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"\"(),:;<>@[\\]".contains(&byte));
    if good_mailbox && is_dns_name(domain) {
        Ok(())
    } else {
        Err("not a valid e-mail address, such as backup@example.org".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn server_names_are_validated() {
        for good in ["localhost", "nbd.example.org", "*.example.org", "my_host", "xn--bcher-kva.de"]
        {
            assert_eq!(SubjectName::parse_server(good), Ok(SubjectName::Dns(good.to_owned())));
        }
        for good in ["192.0.2.7", "::1", "2001:db8::7"] {
            assert_eq!(SubjectName::parse_server(good), Ok(SubjectName::Ip(good.parse().unwrap())));
        }
        let short = [
            "", " ", "a b", "a/b", "..", ".", "a..b", "[::1]", "10.0.0", "a\nb", "*", "*.*.org",
            "a.*.org", "-a",
        ];
        let long = [
            "nbd.example.org.",
            "bücher.de",
            "10.0.0.0/8",
            "host:10809",
            "nbd://host",
            "me@example.org",
            &"a".repeat(64),
            &"a.".repeat(150),
        ];
        for bad in short.into_iter().chain(long) {
            assert!(SubjectName::parse_server(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn client_names_are_classified() {
        let kind = |text: &str| SubjectName::parse_client(text).map(|name| name.kind());
        for (text, expected) in [
            ("backup.example.org", "dns"),
            ("192.0.2.9", "ip"),
            ("me+nbd@example.org", "email"),
            ("spiffe://corp/backup/1", "uri"),
            ("urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "uri"),
            ("backup1", "cn"),
            ("Büro 2", "cn"),
            ("..", "cn"),
            ("corp/backup/1", "cn"),
            ("*.example.org", "cn"),
            ("-x", "cn"),
            ("it's \"mine\"", "cn"),
        ] {
            assert_eq!(kind(text), Ok(expected), "{text}");
        }
        let short =
            ["", " a", "a ", "a\nb", "a\0b", "\u{7f}", "@", "a@", "@b", "a@b@c", "a@bü.org"];
        let long =
            ["a\u{202e}b", "ü@example.org", "://x", "spiffe://", "spiffe://a b", "spiffe://ü"];
        let (words, uri) = ("x".repeat(65), format!("https://x/{}", "y".repeat(2048)));
        for bad in short.into_iter().chain(long).chain([&*words, &uri]) {
            assert!(kind(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        let name = SubjectName::CommonName("Büro \"2\"\u{1b}[2J\u{202e}".to_owned());
        assert_eq!(escape_name(&name), "Büro \"2\"\\u{1b}[2J\\u{202e}");
    }

    #[test]
    fn folder_names_are_safe_and_unique() {
        let plain = |text: &str| SubjectName::CommonName(text.to_owned()).folder_name();
        assert_eq!(plain("nbd.example.org"), "nbd.example.org");
        assert_eq!(plain("spiffe://corp/backup/1"), "spiffe=3A=2F=2Fcorp=2Fbackup=2F1");
        assert_eq!(plain(".."), "=2E.");
        assert_eq!(plain("-x"), "=2Dx");
        let long = "x".repeat(300);
        let mut names: Vec<String> =
            ["a b", "a=20b", "a/b", "a=2Fb", "ä", "a", "A", ".", ".."].map(str::to_owned).to_vec();
        names.extend([158, 159, 160, 161, 162, 300].map(|length| long[..length].to_owned()));
        names.push(long.replace('x', "ü"));
        names.extend([&names[9], &long].map(|name| plain(name)));
        let folders: HashSet<_> = names.iter().map(|name| plain(name)).collect();
        assert_eq!(folders.len(), names.iter().collect::<HashSet<_>>().len());
        for folder in folders {
            assert!(folder.len() <= 255 && !folder.starts_with(['.', '-']), "{folder}");
            assert!(!folder.contains(['/', '%', ',', ' ', ':']), "{folder}");
        }
    }
}
