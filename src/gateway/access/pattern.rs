//! Patterns for names: `*` stands for any characters, `?` for any one.

use std::fmt;
use std::str::FromStr;

/// A pattern; text without `*` and `?` matches itself alone, and it always matches whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<char>,
}

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// It would match nothing but a name that nobody has.
    #[error("a pattern can't be empty; * matches everything")]
    Empty,
    /// Longer than any name.
    #[error("a pattern has at most 4096 characters")]
    TooLong,
}

/// The longest pattern, in characters: as long as the longest name.
const MAX_LENGTH: usize = 4096;

impl Pattern {
    /// Whether `name` is what this describes.
    pub fn matches(&self, name: &str) -> bool {
        self.matches_by(name, |expected, got| expected == got)
    }

    /// The same for names in which the case of ASCII letters means nothing, as in DNS.
    pub fn matches_ignoring_case(&self, name: &str) -> bool {
        self.matches_by(name, |expected, got| expected.eq_ignore_ascii_case(&got))
    }

    /// Goes through both once; when it gets stuck, the last `*` takes one character more.
    /// An earlier `*` never has to: what follows it has been found as early as possible.
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
    fn patterns_match_whole() {
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
    fn hostile_patterns_take_no_time() {
        let pattern = "*a".repeat(2000);
        assert!(!matches(&pattern, &format!("{}b", "a".repeat(4000))));
    }

    #[test]
    fn case_is_ignored_where_it_means_nothing() {
        let pattern: Pattern = "*.Example.org".parse().unwrap();
        assert!(pattern.matches_ignoring_case("WEB.example.ORG"));
        assert!(!pattern.matches("WEB.example.ORG"));
    }

    /// All ways to match, tried one after another.
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
        fn as_a_naive_matcher_does(pattern in "[ab*?]{1,8}", name in "[abc]{0,8}") {
            let parts: Vec<char> = pattern.chars().collect();
            let letters: Vec<char> = name.chars().collect();
            proptest::prop_assert_eq!(matches(&pattern, &name), naive(&parts, &letters));
        }
    }
}
