//! Rate limit for log lines about archives.

use std::time::Duration;

use nbd_telemetry::RateLimit;

/// Rate limit for log lines about archives, shared by all snapshots that are opened with it.
///
/// A folder may have more archives than are kept open, so clients can cause archives to be opened
/// again and again. The limit is large enough to diagnose problems: 100 lines at once, then one per
/// second. A line that follows suppressed ones has their number in its field `held_back`.
#[derive(Debug)]
pub struct LogLimit(RateLimit);

impl Default for LogLimit {
    fn default() -> Self {
        Self(RateLimit::new(100, Duration::from_secs(1)))
    }
}

impl LogLimit {
    /// Returns `Some` if a line may be logged now. The inner value is the number of lines
    /// suppressed since the last one, for a field of the log line.
    pub(crate) fn allow(&self) -> Option<Option<u64>> {
        self.0.allow().map(|suppressed| suppressed.field())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_about_archives_are_rate_limited() {
        let limit = LogLimit::default();
        let allowed = (0..10_000).filter(|_| limit.allow().is_some()).count();
        assert!((1..=150).contains(&allowed), "{allowed}");
    }
}
