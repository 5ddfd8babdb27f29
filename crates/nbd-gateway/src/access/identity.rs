//! The identity that a client's certificate gives it, and the patterns by which rules match
//! identities.

use std::fmt;
use std::str::FromStr;

use super::pattern::{Pattern, PatternError};
use nbd_telemetry::escape;

/// Kind of a name in a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NameKind {
    /// A URI among the subject alternative names, such as a SPIFFE ID.
    Uri,
    /// A DNS name among the subject alternative names.
    Dns,
    /// An e-mail address among the subject alternative names.
    Email,
    /// The subject's common name.
    CommonName,
    /// The SHA-256 of the whole certificate, as 64 lowercase hexadecimal digits.
    Sha256,
}

impl NameKind {
    /// All kinds, the most specific first.
    pub const ALL: [Self; 5] = [Self::Uri, Self::Dns, Self::Email, Self::CommonName, Self::Sha256];

    /// Returns true for subject alternative names.
    fn is_alternative(self) -> bool {
        matches!(self, Self::Uri | Self::Dns | Self::Email)
    }

    /// Returns the prefix by which a rule selects names of this kind only.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Uri => "uri:",
            Self::Dns => "dns:",
            Self::Email => "email:",
            Self::CommonName => "cn:",
            Self::Sha256 => "sha256:",
        }
    }
}

/// A name in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdentityName {
    /// Kind of the name.
    pub kind: NameKind,
    /// The name itself, without the prefix of its kind.
    pub text: String,
}

impl fmt::Display for IdentityName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The signer of the certificate chose the text, so it is escaped: a log entry must stay one
        // line.
        write!(f, "{}{}", self.kind.prefix(), escape::name(&self.text))
    }
}

/// Identity of a client: all names in its certificate, and the certificate's hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Names in the order of [`NameKind`]; the certificate's hash is the last.
    names: Vec<IdentityName>,
}

impl Identity {
    /// Creates an identity from names, one of which is the certificate's hash.
    pub fn new(mut names: Vec<IdentityName>) -> Self {
        names.sort_by_key(|name| NameKind::ALL.iter().position(|kind| *kind == name.kind));
        Self { names }
    }

    /// Returns all names.
    pub fn names(&self) -> &[IdentityName] {
        &self.names
    }
}

/// Writes the most specific name: a URI, else a DNS name, and so on.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.names.first() {
            Some(name) => name.fmt(f),
            None => f.write_str("nobody"),
        }
    }
}

/// Pattern by which a rule matches identities, for names of any kind or of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityPattern {
    kind: Option<NameKind>,
    pattern: Pattern,
}

/// Reason why a text isn't a valid identity pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityPatternError {
    /// The pattern itself is invalid.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// The text after `sha256:` isn't a hash.
    #[error(
        "invalid SHA-256 of a certificate {:?}: expected 64 hexadecimal digits, as printed by \
         openssl x509 -noout -fingerprint -sha256",
        escape::name(.0)
    )]
    InvalidHash(String),
}

impl IdentityPattern {
    /// Returns true if the pattern matches an identity that is to be allowed. A pattern for any
    /// kind considers the common name only if there are no alternative names, as RFC 6125 requires
    /// for servers.
    pub fn matches(&self, identity: &Identity) -> bool {
        let has_alternatives = identity.names.iter().any(|name| name.kind.is_alternative());
        self.matches_any_name(identity, |name| {
            name.kind != NameKind::CommonName || !has_alternatives
        })
    }

    /// Returns true if the pattern may match an identity that is to be denied: any name is
    /// considered.
    pub fn may_match(&self, identity: &Identity) -> bool {
        self.matches_any_name(identity, |_| true)
    }

    /// Returns true if a name matches. Only names of the pattern's kind are considered, or, if it
    /// has none, those for which `counts` returns true.
    fn matches_any_name(
        &self,
        identity: &Identity,
        counts: impl Fn(&IdentityName) -> bool,
    ) -> bool {
        let wanted = |name: &&IdentityName| match self.kind {
            Some(kind) => kind == name.kind,
            None => counts(name),
        };
        identity.names.iter().filter(wanted).any(|name| match name.kind {
            // DNS names are case-insensitive, and nobody relies on the case of e-mail addresses.
            NameKind::Dns | NameKind::Email => self.pattern.matches_ignoring_case(&name.text),
            NameKind::Uri | NameKind::CommonName | NameKind::Sha256 => {
                self.pattern.matches(&name.text)
            }
        })
    }
}

impl FromStr for IdentityPattern {
    type Err = IdentityPatternError;

    fn from_str(text: &str) -> Result<Self, IdentityPatternError> {
        for kind in NameKind::ALL {
            if let Some(rest) = text.strip_prefix(kind.prefix()) {
                let pattern = match kind {
                    NameKind::Sha256 => hash(rest)?,
                    _ => rest.to_owned(),
                };
                return Ok(Self { kind: Some(kind), pattern: pattern.parse()? });
            }
        }
        Ok(Self { kind: None, pattern: text.parse()? })
    }
}

/// Converts a hash as programs print it to the form of [`NameKind::Sha256`].
fn hash(text: &str) -> Result<String, IdentityPatternError> {
    const DIGITS: usize = 64;
    let digits: String = text.chars().filter(|&digit| digit != ':').collect();
    if digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        Ok(digits.to_ascii_lowercase())
    } else {
        Err(IdentityPatternError::InvalidHash(text.to_owned()))
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.kind.map_or("", NameKind::prefix), self.pattern)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn somebody() -> Identity {
        let name = |kind, text: &str| IdentityName { kind, text: text.to_owned() };
        Identity::new(vec![
            name(NameKind::Sha256, &"ab".repeat(32)),
            name(NameKind::CommonName, "Alice"),
            name(NameKind::Dns, "laptop.example.org"),
            name(NameKind::Uri, "spiffe://corp/backup/7"),
        ])
    }

    fn is(pattern: &str) -> bool {
        pattern.parse::<IdentityPattern>().unwrap().matches(&somebody())
    }

    #[test]
    fn patterns_match_any_whole_name() {
        for pattern in [
            "cn:Alice",
            "*.EXAMPLE.org",
            "dns:laptop.example.org",
            "spiffe://corp/backup/*",
            "uri:spiffe://corp/*",
            "*",
            &format!("sha256:{}", "AB:".repeat(31) + "ab"),
        ] {
            assert!(is(pattern), "{pattern}");
        }
        for pattern in
            ["Alice", "cn:alice", "uri:Alice", "cn:spiffe*", "example.org", "email:*", "Alice?"]
        {
            assert!(!is(pattern), "{pattern}");
        }
        assert_eq!(somebody().to_string(), "uri:spiffe://corp/backup/7");
        let kinds: Vec<_> = somebody().names().iter().map(|name| name.kind).collect();
        let expected = [NameKind::Uri, NameKind::Dns, NameKind::CommonName, NameKind::Sha256];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn common_name_matches_only_without_alternative_names() {
        let alice = IdentityName { kind: NameKind::CommonName, text: "Alice".to_owned() };
        let pattern: IdentityPattern = "Alice".parse().unwrap();
        assert!(pattern.matches(&Identity::new(vec![alice])));
        assert!(!pattern.matches(&somebody()) && pattern.may_match(&somebody()));
        for other in ["Bob", "dns:Alice", "Alic", "email:*"] {
            assert!(!other.parse::<IdentityPattern>().unwrap().may_match(&somebody()), "{other}");
        }
    }

    #[test]
    fn invalid_identity_patterns_are_rejected() {
        for junk in ["", "cn:", "sha256:", "sha256:ab", "sha256:*", &"sha256:g".repeat(64)] {
            assert!(junk.parse::<IdentityPattern>().is_err(), "{junk}");
        }
    }
}
