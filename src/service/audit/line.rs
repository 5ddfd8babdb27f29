//! Serialization of events: one JSON object a line, safe to view in a terminal, with texts of
//! bounded length.

use std::time::SystemTime;

use serde::ser::Error as _;

use nbd_gateway::audit::Event;
use nbd_telemetry::escape;

/// A serialized event, without the members that are added when it is queued.
#[derive(Debug, Clone)]
pub(super) struct EventLine {
    time: SystemTime,
    /// JSON of the event without its opening brace, with the newline.
    rest: Vec<u8>,
}

impl EventLine {
    /// Serializes an event, with the current time.
    ///
    /// # Errors
    /// The event doesn't serialize to a JSON object, which isn't known to happen.
    pub(super) fn new(event: &Event) -> Result<Self, serde_json::Error> {
        let mut rest = serialize_members(event)?;
        if rest.first() != Some(&b'{') {
            return Err(serde_json::Error::custom("an event is no object"));
        }
        rest.remove(0);
        rest.push(b'\n');
        Ok(Self { time: SystemTime::now(), rest })
    }

    /// Builds the complete line. `seq` reveals gaps; `run` needs no escaping.
    pub(super) fn to_bytes(&self, seq: u64, run: &str) -> Vec<u8> {
        let time = humantime::format_rfc3339_micros(self.time);
        let mut line =
            format!("{{\"time\":\"{time}\",\"run\":\"{run}\",\"seq\":{seq},").into_bytes();
        line.extend_from_slice(&self.rest);
        line
    }

    /// Returns an upper bound of the line's length, in bytes.
    pub(super) fn max_length(&self, run: &str) -> usize {
        /// Room for the time, the sequence number and their member names.
        const HEAD: usize = 96;
        HEAD + run.len() + self.rest.len()
    }
}

/// Serializes an event's own members.
pub(super) fn serialize_members(event: &Event) -> Result<Vec<u8>, serde_json::Error> {
    // Hidden characters that JSON leaves alone are escaped too, so that lines are safe to view in a
    // terminal.
    Ok(escape::json(&serde_json::to_string(event)?).into_owned().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_gateway::audit::ReloadFailed;

    fn line(why: &str) -> String {
        let event = Event::ReloadFailed(ReloadFailed { why: why.into() });
        let line = EventLine::new(&event).unwrap();
        let bytes = line.to_bytes(3, "r");
        assert!(bytes.len() <= line.max_length("r"));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn hostile_text_stays_on_one_line() {
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
    fn long_texts_make_bounded_lines() {
        assert!(line(&"\u{1}".repeat(9999)).len() < 6 * nbd_gateway::audit::MAX_TEXT + 200);
    }
}
