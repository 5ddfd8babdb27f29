//! Sets up the tokio runtime, and handles the signals that end the program.

use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::exit_status::Failure;

/// Prepares the runtime without starting it. The number of threads is determined here, since the
/// limit of the control group can't be read in the sandbox.
pub(crate) fn prepare() -> Builder {
    let mut runtime = Builder::new_multi_thread();
    runtime.event_interval(5).global_queue_interval(5).enable_all();
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none()
        && let Ok(cores) = std::thread::available_parallelism()
    {
        runtime.worker_threads(cores.get());
    }
    runtime
}

/// Runs `work` to completion. SIGTERM or SIGINT cancels the token passed to it; a second signal
/// ends the program immediately. Stores the time of the first one in `shutdown_at`.
pub(crate) fn run_until_signal(
    mut runtime: Builder,
    shutdown_at: &mut Option<Instant>,
    work: impl AsyncFnOnce(CancellationToken) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let runtime = runtime.build()?;
    let ended = runtime.block_on(async {
        let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = CancellationToken::new();
        tokio::select! {
            done = work(shutdown.clone()) => done,
            () = wait_for_second_signal(signals, &shutdown, shutdown_at) => Ok(()),
        }
    });
    // A thread that hangs in a read from a dead file system must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

async fn wait_for_second_signal(
    (mut terminate, mut interrupt): (Signal, Signal),
    shutdown: &CancellationToken,
    shutdown_at: &mut Option<Instant>,
) {
    let mut either = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let signal = either().await;
    tracing::info!(signal, "shutting down: draining in-flight requests");
    *shutdown_at = Some(Instant::now());
    shutdown.cancel();
    let signal = either().await;
    tracing::warn!(reason = "second_signal", signal, "second signal: terminating immediately");
}
