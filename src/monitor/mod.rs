//! What goes on, shown by HTTP to whoever runs the gateway: a page for people (`/`), numbers
//! for Prometheus (`/metrics`), both as JSON (`/status.json`), and whether it lives and serves
//! (`/healthz`, `/readyz`).
//!
//! It only shows, and can't be told anything. [`Observed`] knows where the numbers come from,
//! [`Status`] is all of them at one moment, `answers.rs` decides what a request gets,
//! `connections.rs` deals with whoever asks. All of it runs on one thread of low priority
//! that has a runtime of its own: it answers while the gateway is loaded, and takes nothing
//! from those whom the gateway serves.

mod answers;
mod connections;
mod deadline;
mod host;
mod metrics;
mod observed;
mod page;
mod recent;
mod resident;
mod status;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::runtime::Builder;
use tokio::sync::oneshot;

use crate::gateway::listen::{Bound, Listener};
use answers::Answers;
pub use host::{HostName, HostNameError};
pub use observed::{AuditReport, Observed};
pub use recent::{RecentErrors, RememberErrors};
pub use status::{Cache, Memory, RecentError, Status, Storage};

/// The port that documentation and `hexz-nbd top` take for the monitor's. Nothing listens
/// there unless it is told to.
pub const MONITOR_PORT: u16 = 10810;

/// How much nicer its thread is: as much as those that decode.
const NICE: i32 = 10;

/// A monitor that answers. It ends when this is dropped.
#[derive(Debug)]
pub struct Monitor {
    /// Dropped to end it.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    address: String,
}

impl Monitor {
    /// Answers on `socket` with what is `observed`, on a thread of its own. `names` are those
    /// by which it may be asked for besides `localhost` and addresses.
    ///
    /// # Errors
    /// The system has no thread or no descriptors left.
    pub fn start(socket: Bound, names: Vec<HostName>, observed: Arc<Observed>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _within = runtime.enter();
            Listener::new(socket)?
        };
        let address = listener.local_address()?.to_string();
        let (stop, stopped) = oneshot::channel();
        let answers = Arc::new(Answers::new(names, observed));
        let thread = std::thread::Builder::new().name("monitor".to_owned()).spawn(move || {
            give_way();
            runtime.block_on(connections::serve(listener, answers, stopped));
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread), address })
    }

    /// Where it listens, with its real port.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // It has nothing to wait for. If it has panicked, that has been said.
            thread.join().unwrap_or_default();
        }
    }
}

fn give_way() {
    // On Linux this is about the calling thread alone.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!("the monitor keeps its priority: {error}");
    }
}
