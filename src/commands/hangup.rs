//! Reaction of commands to SIGHUP.
//!
//! To the server, SIGHUP means reload, and it is often sent to all processes of a name (`pkill -HUP
//! hexz-nbd`). That must not end a `verify` that has been running for an hour. So a command ends on
//! SIGHUP only if its terminal has been closed. Under `nohup` it continues even then.

use std::fs::File;
use std::io;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, raise};

/// Number of checks of the terminal after a signal, and the interval between them. Shells that
/// exit signal their jobs first, and give up the terminal afterwards.
const CHECKS: u32 = 20;
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Ignores SIGHUP unless the terminal has been closed. Must be called while there is only one
/// thread.
pub(crate) fn ignore_unless_terminal_is_closed() -> io::Result<()> {
    let signals = SigSet::from(Signal::SIGHUP);
    // Threads inherit the mask. Processes that are started don't.
    signals.thread_block()?;
    let had_terminal = has_terminal();
    thread::Builder::new().name("hangup".to_owned()).spawn(move || {
        while signals.wait().is_ok() {
            if had_terminal && loses_terminal() {
                // Ends the process, unless the signal is handled, or ignored as under nohup.
                signals.thread_unblock().unwrap_or_default();
                raise(Signal::SIGHUP).unwrap_or_default();
                return;
            }
            tracing::debug!("SIGHUP ignored: only the server can be reloaded");
        }
    })?;
    Ok(())
}

/// Returns true if the terminal is closed, now or shortly after.
fn loses_terminal() -> bool {
    (0..CHECKS).any(|_| {
        let is_lost = !has_terminal();
        if !is_lost {
            thread::sleep(CHECK_INTERVAL);
        }
        is_lost
    })
}

/// Returns true if the process has a controlling terminal, and it hasn't been closed.
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}
