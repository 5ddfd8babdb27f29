//! Log lines about archives that have been opened. Clients of a folder with more archives than
//! are kept open can have them opened again and again.

use std::sync::LazyLock;
use std::time::Duration;

use crate::limited::RateLimit;

/// One for all archives: enough to see what is wrong with them.
static LINES: LazyLock<RateLimit> = LazyLock::new(|| RateLimit::new(100, Duration::from_secs(1)));

/// Whether to say something now; then also how much was left out since the last time, as a
/// field of the line.
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
