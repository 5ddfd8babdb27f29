//! Serialization of events: one JSON object a line, safe to view in a terminal, with texts of
//! bounded length.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::ser::Error as _;
use serde::{Serialize, Serializer};

use super::Event;
use crate::escape;

/// Maximum length of a text in an event, in bytes: more than names and messages about them have. A
/// longer text is truncated and ends with `…`.
pub const MAX_TEXT: usize = 1024;

/// A text of at most [`MAX_TEXT`] bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Text(String);

impl Text {
    /// Creates a text from anything that can be displayed; truncates it if necessary.
    pub fn of(text: impl ToString) -> Self {
        Self::from(text.to_string())
    }
}

impl From<String> for Text {
    fn from(mut text: String) -> Self {
        const CUT: &str = "…";
        if text.len() > MAX_TEXT {
            text.truncate(text.floor_char_boundary(MAX_TEXT - CUT.len()));
            text.push_str(CUT);
        }
        Self(text)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

/// A time, serialized in UTC as RFC 3339 specifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(SystemTime);

impl Time {
    /// Creates a time from seconds since the Unix epoch. RFC 3339 ends with the year 9999; later
    /// times are clamped to its last second.
    pub fn of_unix(seconds: u64) -> Self {
        const LAST: u64 = 253_402_300_799;
        Self(UNIX_EPOCH + Duration::from_secs(seconds.min(LAST)))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_seconds(self.0))
    }
}

/// A serialized event, without the members that are added when it is queued.
#[derive(Debug, Clone)]
pub(super) struct Line {
    time: SystemTime,
    /// JSON of the event without its opening brace, with the newline.
    rest: Vec<u8>,
}

impl Line {
    /// Serializes an event, with the current time.
    ///
    /// # Errors
    /// The event doesn't serialize to a JSON object, which isn't known to happen.
    pub(super) fn of(event: &Event) -> Result<Self, serde_json::Error> {
        let mut rest = body(event)?;
        if rest.first() != Some(&b'{') {
            return Err(serde_json::Error::custom("an event is no object"));
        }
        rest.remove(0);
        rest.push(b'\n');
        Ok(Self { time: SystemTime::now(), rest })
    }

    /// Builds the complete line. `seq` reveals gaps; `run` needs no escaping.
    pub(super) fn numbered(&self, seq: u64, run: &str) -> Vec<u8> {
        let time = humantime::format_rfc3339_micros(self.time);
        let mut line =
            format!("{{\"time\":\"{time}\",\"run\":\"{run}\",\"seq\":{seq},").into_bytes();
        line.extend_from_slice(&self.rest);
        line
    }

    /// Returns an upper bound of the line's length, in bytes.
    pub(super) fn length(&self, run: &str) -> usize {
        /// Room for the time, the sequence number and their member names.
        const HEAD: usize = 96;
        HEAD + run.len() + self.rest.len()
    }
}

/// Serializes an event's own members.
pub(super) fn body(event: &Event) -> Result<Vec<u8>, serde_json::Error> {
    // Hidden characters that JSON leaves alone are escaped too, so that lines are safe to view in a
    // terminal.
    Ok(escape::json(&serde_json::to_string(event)?).into_owned().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::super::event::ReloadFailed;
    use super::*;

    fn line(why: &str) -> String {
        let event = Event::ReloadFailed(ReloadFailed { why: why.into() });
        let line = Line::of(&event).unwrap();
        let bytes = line.numbered(3, "r");
        assert!(bytes.len() <= line.length("r"));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_line_is_one_whatever_is_in_it() {
        let hostile =
            "a\n{\"event\":\"stop\"}\r\u{1b}[2J\u{9b}\u{7f}\u{85}\u{61c}\u{2028}\u{202e}\"\\ö";
        let line = line(hostile);
        assert!(line.ends_with("}\n") && line.starts_with("{\"time\":\"2"));
        assert!(!line.trim_end_matches('\n').chars().any(escape::is_hidden), "{line:?}");
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["why"], hostile);
        assert_eq!((json["seq"].as_u64(), json["run"].as_str()), (Some(3), Some("r")));
        // 2026-11-25T22:57:16.123456Z
        let time = json["time"].as_str().unwrap();
        assert_eq!((time.len(), &time[19..20], &time[26..]), (27, ".", "Z"));
    }

    #[test]
    fn long_texts_are_cut_between_letters() {
        assert_eq!(Text::from("x".repeat(MAX_TEXT)).0.len(), MAX_TEXT);
        let cut = Text::from("ö".repeat(MAX_TEXT)).0;
        assert!(cut.len() <= MAX_TEXT && cut.ends_with("ö…"));
        assert!(line(&"\u{1}".repeat(9999)).len() < 6 * MAX_TEXT + 200);
    }

    #[test]
    fn times_beyond_all_calendars_are_times() {
        let text = |seconds| serde_json::to_string(&Time::of_unix(seconds)).unwrap();
        assert_eq!(text(0), "\"1970-01-01T00:00:00Z\"");
        assert_eq!(text(u64::MAX), "\"9999-12-31T23:59:59Z\"");
    }
}
