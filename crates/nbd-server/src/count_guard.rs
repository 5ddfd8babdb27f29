//! RAII counter of concurrent operations.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Guard that increments a counter when created and decrements it when dropped, which includes
/// cancellation of the future that holds it.
pub(super) struct CountGuard<'a>(&'a AtomicUsize);

impl<'a> CountGuard<'a> {
    pub(super) fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for CountGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
