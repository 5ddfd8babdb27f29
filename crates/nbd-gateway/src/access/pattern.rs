//! Glob patterns for names: `*` matches any characters, `?` matches any single one.

use std::fmt;
use std::str::FromStr;

/// A glob pattern. It has to match the whole name; without `*` and `?` it matches only itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<char>,
}

/// Reason why a text isn't a valid pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The pattern is empty, so it would match only an empty name, which nobody has.
    #[error("empty pattern; * matches everything")]
    Empty,
    /// The pattern is longer than any name.
    #[error("pattern is longer than {MAX_LENGTH} characters")]
    TooLong,
}

/// Maximum length of a pattern, in characters; the maximum length of a name.
const MAX_LENGTH: usize = 4096;

impl Pattern {
    /// Returns true if the pattern matches `name`.
    pub fn matches(&self, name: &str) -> bool {
        self.matches_by(name, |expected, got| expected == got)
    }

    /// Returns true if the pattern matches `name`, ignoring the case of ASCII letters, as DNS does.
    pub fn matches_ignoring_case(&self, name: &str) -> bool {
        self.matches_by(name, |expected, got| expected.eq_ignore_ascii_case(&got))
    }

    /// Matches pattern and name from left to right. On a mismatch, the last `*` takes one more
    /// character. An earlier `*` never has to: what follows it was found as early as possible.
    fn matches_by(&self, name: &str, same: impl Fn(char, char) -> bool) -> bool {
        let name: Vec<char> = name.chars().collect();
        let (mut at, mut part) = (0, 0);
        let mut last_star: Option<(usize, usize)> = None;
        while let Some(&got) = name.get(at) {
            match self.parts.get(part) {
                Some('*') => {
                    last_star = Some((part, at));
                    part += 1;
                }
                Some(&expected) if expected == '?' || same(expected, got) => {
                    part += 1;
                    at += 1;
                }
                _ => {
                    let Some((star, taken)) = last_star else { return false };
                    last_star = Some((star, taken + 1));
                    (part, at) = (star + 1, taken + 1);
                }
            }
        }
        self.parts.iter().skip(part).all(|&part| part == '*')
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let parts: Vec<char> = text.chars().collect();
        match parts.len() {
            0 => Err(PatternError::Empty),
            1..=MAX_LENGTH => Ok(Self { text: text.to_owned(), parts }),
            _ => Err(PatternError::TooLong),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(name)
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name) in [
            ("alice", "alice"),
            ("*", ""),
            ("*", "anything/at all"),
            ("spiffe://corp/backup/*", "spiffe://corp/backup/a/b"),
            ("*.hxz", "a.hxz.hxz"),
            ("a*b*c", "aXbXbXc"),
            ("?", "ü"),
            ("**", "x"),
            ("web-??", "web-01"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("alice", "alice2"),
            ("alice", "malice"),
            ("alice", "Alice"),
            ("alice", "alice\0"),
            ("spiffe://corp/backup/*", "spiffe://corp/backup"),
            ("*.hxz", "a.hxz/aux"),
            ("?", ""),
            ("?", "ab"),
            ("a*b", "ab "),
            ("[a]", "a"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
        assert_eq!("".parse::<Pattern>(), Err(PatternError::Empty));
        assert!("a".repeat(4096).parse::<Pattern>().is_ok());
        assert_eq!("a".repeat(4097).parse::<Pattern>(), Err(PatternError::TooLong));
    }

    #[test]
    fn pathological_patterns_match_quickly() {
        let pattern = "*a".repeat(2000);
        assert!(!matches(&pattern, &format!("{}b", "a".repeat(4000))));
    }

    #[test]
    fn case_is_ignored_on_request() {
        let pattern: Pattern = "*.Example.org".parse().unwrap();
        assert!(pattern.matches_ignoring_case("WEB.example.ORG"));
        assert!(!pattern.matches("WEB.example.ORG"));
    }

    /// Matches by trying all possibilities in turn.
    fn naive(pattern: &[char], name: &[char]) -> bool {
        match (pattern, name) {
            ([], name) => name.is_empty(),
            (['*', rest @ ..], name) => (0..=name.len()).any(|taken| naive(rest, &name[taken..])),
            (['?', rest @ ..], [_, name @ ..]) => naive(rest, name),
            ([a, rest @ ..], [b, name @ ..]) => a == b && naive(rest, name),
            _ => false,
        }
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_naive_matcher(pattern in "[ab*?]{1,8}", name in "[abc]{0,8}") {
            let parts: Vec<char> = pattern.chars().collect();
            let letters: Vec<char> = name.chars().collect();
            proptest::prop_assert_eq!(matches(&pattern, &name), naive(&parts, &letters));
        }
    }
}
