//! Thread pool for client handshakes: TLS, then the choice of an export. Archives opened for a
//! client are opened there too.
//!
//! The threads run at a low priority. Otherwise a flood of handshakes would leave no processor time
//! for reads.

use std::fmt;
use std::future::Future;
use std::io;

use nbd_telemetry::lower_thread_priority;
use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

/// Niceness of these threads. It equals that of the decoder threads, so that neither handshakes nor
/// reads that need decoding starve the other.
const NICE: i32 = 10;

/// A separate tokio runtime with low-priority threads.
pub(crate) struct HandshakePool {
    /// `None` only while being dropped.
    runtime: Option<Runtime>,
}

impl fmt::Debug for HandshakePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandshakePool(…)")
    }
}

impl HandshakePool {
    /// Starts one thread per core.
    pub(crate) fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(std::thread::available_parallelism().map_or(1, usize::from))
            .thread_name("handshakes")
            .on_thread_start(|| lower_thread_priority(NICE))
            .enable_time()
            .build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// Runs `work` on the pool. Dropping the returned future aborts it. Returns `None` if it
    /// panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let runtime = self.runtime.as_ref()?;
        AbortOnDropHandle::new(runtime.spawn(work.in_current_span())).await.ok()
    }
}

impl Drop for HandshakePool {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which isn't allowed in async code.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
