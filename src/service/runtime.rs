//! Sets up the tokio runtime, and handles the signals that end the program.

use std::time::Duration;

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
/// ends the program immediately.
pub(crate) fn run_until_signal(
    mut runtime: Builder,
    work: impl AsyncFnOnce(CancellationToken) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let runtime = runtime.build()?;
    let ended = runtime.block_on(async {
        let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = CancellationToken::new();
        tokio::select! {
            done = work(shutdown.clone()) => done,
            () = wait_for_second_signal(signals, &shutdown) => Ok(()),
        }
    });
    // A thread that hangs in a read from a dead file system must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

async fn wait_for_second_signal(
    (mut terminate, mut interrupt): (Signal, Signal),
    shutdown: &CancellationToken,
) {
    let mut either = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    either().await;
    tracing::info!("told to end: answering what has been asked, accepting nothing new");
    shutdown.cancel();
    either().await;
    tracing::warn!("told to end again: ending at once");
}
