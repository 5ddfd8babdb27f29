//! Writes to standard output, which its reader may close, and formats what several commands show.

use std::io::{Write, stdout};
use std::time::{Duration, SystemTime};

use nbd_telemetry::escape;
use serde_json::Value;

use crate::exit_status::{Failure, OutputError};

/// Prints the result of a command.
pub(crate) fn print(what: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = stdout().lock();
    out.write_all(what.as_ref()).and_then(|()| out.flush()).map_err(OutputError)?;
    Ok(())
}

/// Formats an object over several lines, without hidden characters.
pub(crate) fn pretty_json(object: &Value) -> String {
    format!("{}\n", escape::json(&format!("{object:#}")))
}

/// Formats a time as in RFC 3339, in UTC.
pub(crate) fn format_time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Formats a short duration, given in seconds.
pub(crate) fn format_seconds(seconds: f64) -> String {
    match seconds {
        s if s < 0.000_999_5 => format!("{:.0} µs", s * 1e6),
        s if s < 0.009_95 => format!("{:.1} ms", s * 1e3),
        s if s < 0.999_5 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

/// Returns a throughput in MiB per second.
#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
pub(crate) fn mebibytes_per_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / took.as_secs_f64().max(1e-6)
}

/// Joins the first names, at most `most`, and tells the number of the others.
pub(crate) fn join_first(names: &[String], most: usize) -> String {
    let first = names.get(..most).unwrap_or(names).join(", ");
    match names.len().checked_sub(most) {
        _ if names.is_empty() => "none".to_owned(),
        Some(more @ 1..) => format!("{first} and {more} more"),
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_durations_have_two_or_three_digits() {
        assert_eq!(
            [0.000_025, 0.001, 0.025, 1.25].map(format_seconds),
            ["25 µs", "1.0 ms", "25 ms", "1.2 s"].map(String::from)
        );
    }

    #[test]
    fn long_lists_are_cut() {
        let names = ["a", "b", "c"].map(String::from);
        assert_eq!(join_first(&names, 3), "a, b, c");
        assert_eq!(join_first(&names, 2), "a, b and 1 more");
        assert_eq!(join_first(&[], 2), "none");
    }
}
