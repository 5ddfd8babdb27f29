//! Rate limit for log lines about opened archives. A folder may have more archives than are kept
//! open, so clients can cause archives to be opened again and again.

use std::sync::LazyLock;
use std::time::Duration;

use nbd_telemetry::RateLimit;

/// Token bucket shared by all archives; large enough to diagnose problems with them.
static LINES: LazyLock<RateLimit> = LazyLock::new(|| RateLimit::new(100, Duration::from_secs(1)));

/// Returns `Some` if a line may be logged now. The inner value is the number of lines suppressed
/// since the last one, for a field of the log line.
pub(super) fn may_say() -> Option<Option<u64>> {
    LINES.allow().map(|held_back| held_back.field())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_can_not_fill_the_log_with_archives() {
        let said = (0..10_000).filter(|_| may_say().is_some()).count();
        assert!((1..=150).contains(&said), "{said}");
    }
}
