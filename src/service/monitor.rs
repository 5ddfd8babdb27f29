//! Serves monitoring data over HTTP, if `--monitor` asks for it.

use std::io;
use std::sync::Arc;

use crate::cli::HostName;
use crate::monitor::{AuditReport, Monitor, Observed, RecentErrors};
use hexz_exports::{BlockReader, Catalog};
use nbd_gateway::Control;
use nbd_gateway::listen::{BoundSocket, ListenAddress};

use crate::cli::Serve;
use crate::failure::Failure;

/// Monitoring resources that can't be obtained inside the sandbox.
pub(crate) struct Show {
    socket: Option<BoundSocket>,
    names: Vec<HostName>,
    observed: Arc<Observed>,
}

/// The running monitor. It stops when this is dropped.
pub(crate) struct Shown {
    _monitor: Option<Monitor>,
    /// Monitoring data, whether or not it is served.
    observed: Arc<Observed>,
}

impl Shown {
    /// Connects a gateway's report to the monitoring data.
    pub(crate) fn watch(&self, control: Control<Catalog>) {
        self.observed.gateway(move || control.report());
    }
}

impl Show {
    /// Binds the monitoring socket, unless the service manager passed one.
    pub(crate) fn prepare(
        options: &Serve,
        handed: Option<BoundSocket>,
        reader: &Arc<BlockReader>,
        recent: RecentErrors,
    ) -> Result<Self, Failure> {
        let asked = options.monitoring.listen();
        let socket = match (handed, asked) {
            (Some(_), Some(_)) => return Err(Failure::MonitorAndHanded),
            (handed, None) => handed,
            (None, Some(at)) => Some(at.bind()?),
        };
        match socket.as_ref().map(BoundSocket::address) {
            Some(Ok(address @ ListenAddress::Vsock { .. })) => tracing::warn!(
                "the monitor listens on {address}: every virtual machine can see who is connected",
            ),
            Some(Ok(address)) if !address.is_local() => tracing::warn!(
                "the monitor listens on {address}: whoever can reach it sees who is connected, and \
                 anyone on the way can read it",
            ),
            _ => {}
        }
        let budget = options.memory().total();
        let observed = Arc::new(Observed::new(budget, Arc::clone(reader), recent));
        Ok(Self { socket, names: options.monitoring.names().to_owned(), observed })
    }

    /// Starts serving, on a thread of its own. `audit` returns the event counters.
    pub(crate) fn start(
        self,
        audit: Option<impl Fn() -> AuditReport + Send + Sync + 'static>,
    ) -> io::Result<Shown> {
        let Self { socket, names, observed } = self;
        if let Some(counts) = audit {
            observed.audit(counts);
        }
        let monitor = match socket {
            Some(socket) => Some(Monitor::start(socket, names, Arc::clone(&observed))?),
            None => None,
        };
        if let Some(monitor) = &monitor {
            tracing::info!(monitor = monitor.address(), "what goes on is shown by HTTP");
        }
        Ok(Shown { _monitor: monitor, observed })
    }
}
