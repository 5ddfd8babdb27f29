//! HTTP status listener for the operators of a gateway: a page for people (`/`), metrics for
//! Prometheus (`/metrics`), the same data as JSON (`/status.json`) with that of the last minutes
//! (`/history.json`), checks of health and readiness (`/healthz`, `/readyz`), and traces of what
//! clients read (`/trace`).
//!
//! It is read-only: no request changes anything for clients. [`StatusSource`] collects the data, [`Status`] is a
//! snapshot of it, `responses.rs` maps requests to responses, and `connections.rs` accepts
//! connections. Everything runs on one thread of low priority with a runtime of its own, so the
//! monitor answers while the gateway is under load, and takes no time from the gateway's clients.

mod auth;
mod connections;
mod history;
mod host;
mod metrics;
mod page;
mod problems;
mod process;
mod reasons;
mod recent;
mod responses;
mod source;
mod status;
mod stores;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::runtime::Builder;
use tokio::sync::oneshot;

use crate::cli::HostName;
pub(crate) use auth::{MonitorAuth, MonitorAuthFiles, read_token_file};
use nbd_gateway::listen::{BoundSocket, Listener};
pub(crate) use recent::RecentErrors;
use responses::RequestHandler;
pub(crate) use source::{AuditCounts, StatusSource};
pub(crate) use status::Status;
pub(crate) use stores::StoreStatus;
#[cfg(feature = "remote")]
pub(crate) use stores::StoresStatus;

/// Niceness of the monitor's thread. It equals that of the decoder threads.
const NICE: i32 = 10;

/// A running monitor. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Monitor {
    /// Stops the monitor when it is dropped.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    address: String,
}

impl Monitor {
    /// Starts a monitor that serves the status of `source` on `socket`, on a thread of its own, to
    /// readers that `auth` admits. Requests may use `names`, besides `localhost` and addresses.
    ///
    /// # Errors
    /// The system has no threads or no file descriptors left.
    pub(crate) fn start(
        socket: BoundSocket,
        names: Vec<HostName>,
        auth: Arc<MonitorAuth>,
        observed: Arc<StatusSource>,
    ) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _within = runtime.enter();
            Listener::new(socket)?
        };
        let address = listener.local_address()?.to_string();
        let (stop, stopped) = oneshot::channel();
        let handler = Arc::new(RequestHandler::new(names, auth, Arc::clone(&observed)));
        let thread = std::thread::Builder::new().name("monitor".to_owned()).spawn(move || {
            nbd_telemetry::lower_thread_priority(NICE);
            let sampling = runtime.spawn(history::sample(observed));
            runtime.block_on(connections::serve(listener, handler, stopped));
            sampling.abort();
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread), address })
    }

    /// Returns the address that it listens on, with the actual port.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // The thread ends without delay. A panic has already been reported.
            thread.join().unwrap_or_default();
        }
    }
}
