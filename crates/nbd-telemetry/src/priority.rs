//! Priorities of threads.

/// Lowers the priority of the calling thread by `niceness` (see `setpriority(2)`), so that other
/// threads go first when there aren't enough cores for all. On Linux this affects no other thread
/// of the process. Other programs aren't affected where each service has its own share of the
/// processor, as under systemd.
///
/// A failure is logged at debug level: the thread works nevertheless.
pub fn lower_thread_priority(niceness: i32) {
    if let Err(error) = rustix::process::nice(niceness) {
        let thread = std::thread::current();
        let thread = thread.name();
        tracing::debug!(thread, niceness, "can't lower the priority of a thread: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_calling_thread_is_affected() {
        let niceness = || rustix::process::nice(0).unwrap();
        let before = niceness();
        let lowered = std::thread::spawn(move || {
            lower_thread_priority(3);
            niceness()
        });
        assert_eq!((lowered.join().unwrap(), niceness()), ((before + 3).min(19), before));
    }
}
