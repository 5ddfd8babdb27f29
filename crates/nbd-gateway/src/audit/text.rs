//! Texts of bounded length, and times, in audit events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

/// Maximum length of a text in an event, in bytes: more than names and messages about them have. A
/// longer text is truncated and ends with `…`.
pub const MAX_TEXT: usize = 1024;

/// A text of at most [`MAX_TEXT`] bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct BoundedText(String);

impl BoundedText {
    /// Creates a text from anything that can be displayed; truncates it if necessary.
    pub fn from_display(text: impl ToString) -> Self {
        Self::from(text.to_string())
    }
}

impl From<String> for BoundedText {
    fn from(mut text: String) -> Self {
        const CUT: &str = "…";
        if text.len() > MAX_TEXT {
            text.truncate(text.floor_char_boundary(MAX_TEXT - CUT.len()));
            text.push_str(CUT);
        }
        Self(text)
    }
}

impl From<&str> for BoundedText {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

/// A time, serialized in UTC as RFC 3339 specifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rfc3339Time(SystemTime);

impl Rfc3339Time {
    /// Creates a time from seconds since the Unix epoch. RFC 3339 ends with the year 9999; later
    /// times are clamped to its last second.
    pub fn from_unix(seconds: u64) -> Self {
        const LAST: u64 = 253_402_300_799;
        Self(UNIX_EPOCH + Duration::from_secs(seconds.min(LAST)))
    }
}

impl Serialize for Rfc3339Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_seconds(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_truncated_at_character_boundaries() {
        assert_eq!(BoundedText::from("x".repeat(MAX_TEXT)).0.len(), MAX_TEXT);
        let cut = BoundedText::from("ö".repeat(MAX_TEXT)).0;
        assert!(cut.len() <= MAX_TEXT && cut.ends_with("ö…"));
    }

    #[test]
    fn times_are_clamped_to_year_9999() {
        let text = |seconds| serde_json::to_string(&Rfc3339Time::from_unix(seconds)).unwrap();
        assert_eq!(text(0), "\"1970-01-01T00:00:00Z\"");
        assert_eq!(text(u64::MAX), "\"9999-12-31T23:59:59Z\"");
    }
}
