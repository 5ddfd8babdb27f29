//! Threads for the handshakes of clients: TLS, and then the choice of an export. They run at a
//! low priority: otherwise a flood of handshakes would leave no processor time for what clients
//! read. Archives that are opened for a client are opened there as well.

use std::fmt;
use std::future::Future;
use std::io;

use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

/// How much nicer these threads are: as much as those that decode, so that neither handshakes
/// nor reads that have to be decoded wait for the other.
const NICE: i32 = 10;

/// A small runtime of its own.
pub(super) struct Porch {
    /// Taken when this is dropped.
    runtime: Option<Runtime>,
}

impl fmt::Debug for Porch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Porch(…)")
    }
}

impl Porch {
    /// As many threads as there are cores.
    pub(super) fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(std::thread::available_parallelism().map_or(1, usize::from))
            .thread_name("handshakes")
            .on_thread_start(give_way)
            .enable_time()
            .build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// Does something there. It ends when this is dropped. `None` if it panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let runtime = self.runtime.as_ref()?;
        AbortOnDropHandle::new(runtime.spawn(work.in_current_span())).await.ok()
    }
}

impl Drop for Porch {
    fn drop(&mut self) {
        // Waiting for its threads isn't possible where this may be dropped.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn give_way() {
    // On Linux this is about the calling thread alone.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!("handshakes keep their priority: {error}");
    }
}
