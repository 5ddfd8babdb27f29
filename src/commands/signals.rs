//! Signals that end a command early.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals that end the program, with their exit codes.
pub(super) struct ExitSignals(Vec<(Signal, u8)>);

impl ExitSignals {
    /// Handles these signals from now on.
    pub(super) fn new(kinds: impl IntoIterator<Item = SignalKind>) -> io::Result<Self> {
        let with_code = |kind: SignalKind| {
            let number = u8::try_from(kind.as_raw_value()).unwrap_or_default();
            Ok((signal(kind)?, 128 + number))
        };
        kinds.into_iter().map(with_code).collect::<io::Result<_>>().map(Self)
    }

    /// Waits for a signal, and returns its exit code as in shells: 128 plus its number.
    pub(super) async fn next(&mut self) -> u8 {
        poll_fn(|context| {
            let mut received = self
                .0
                .iter_mut()
                .filter_map(|(signal, code)| signal.poll_recv(context).is_ready().then_some(*code));
            received.next().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
