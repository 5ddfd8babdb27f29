//! Formats messages to a service manager, as specified by `sd_notify(3)`: assignments, one per
//! line.

use std::time::Duration;

use nbd_telemetry::escape;

/// Maximum length of a status in bytes; the rest is cut off. systemd drops messages of more than
/// 4096 bytes, and displays a single line.
const MAX_STATUS: usize = 1024;

/// Formats the notification that startup or a reload is complete, with the status `text`.
pub(super) fn ready(text: &str) -> String {
    format!("READY=1\n{}", status(text))
}

/// Formats the notification that a reload has begun, at a time of the monotonic clock.
pub(super) fn reloading(monotonic: Duration) -> String {
    format!("RELOADING=1\nMONOTONIC_USEC={}\n", monotonic.as_micros())
}

pub(super) fn stopping() -> String {
    format!("STOPPING=1\n{}", status("draining in-flight requests"))
}

pub(super) fn alive() -> String {
    "WATCHDOG=1\n".to_owned()
}

/// Formats a request to extend the timeout of the start or the stop, counted from now.
pub(super) fn extend(by: Duration) -> String {
    format!("EXTEND_TIMEOUT_USEC={}\n", by.as_micros())
}

/// Formats a status line. Line breaks are escaped, so that file names can't add assignments.
pub(super) fn status(text: &str) -> String {
    let line = escape::text(text);
    let line = line.get(..line.floor_char_boundary(MAX_STATUS)).unwrap_or_default();
    format!("STATUS={line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_match_the_systemd_protocol() {
        assert_eq!(ready("serving x"), "READY=1\nSTATUS=serving x\n");
        let clock = Duration::new(12, 345_678_000);
        assert_eq!(reloading(clock), "RELOADING=1\nMONOTONIC_USEC=12345678\n");
        assert_eq!(extend(Duration::from_secs(30)), "EXTEND_TIMEOUT_USEC=30000000\n");
        assert_eq!(
            [alive().as_str(), stopping().get(..10).unwrap()],
            ["WATCHDOG=1\n", "STOPPING=1"]
        );
    }

    #[test]
    fn a_status_is_one_short_line() {
        assert_eq!(status("a\nREADY=1\u{7f}\u{85}b"), "STATUS=a\\nREADY=1\\u{7f}\\u{85}b\n");
        assert_eq!(status(""), "STATUS=\n");
        for long in ["x".repeat(5000), "é".repeat(5000), format!("x{}", "é".repeat(5000))] {
            let line = status(&long);
            assert!((1023..=1024).contains(&(line.len() - "STATUS=\n".len())), "{}", line.len());
        }
    }
}
