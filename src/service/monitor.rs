//! Serves monitoring data over HTTP, if `--monitor` asks for it.

use std::io;
use std::sync::Arc;

use crate::cli::HostName;
#[cfg(feature = "remote")]
use crate::monitor::StoresStatus;
use crate::monitor::{AuditCounts, Monitor, RecentErrors, StatusSource};
use hexz_exports::{BlockReader, Catalog};
use nbd_gateway::Control;
use nbd_gateway::listen::{BoundSocket, ListenAddress};
#[cfg(feature = "remote")]
use object_reader::Fetcher;

use crate::cli::ServeOptions;
use crate::exit_status::{Failure, fixed_exit_status};

/// Error for a monitor that is given twice.
#[derive(Debug, thiserror::Error)]
#[error(
    "--monitor conflicts with the socket \"monitor\" passed by the service manager: remove one of them"
)]
struct MonitorAndInherited;

fixed_exit_status! { MonitorAndInherited => USAGE, "monitor_given_twice"; }

/// Monitoring resources that can't be obtained inside the sandbox.
pub(crate) struct MonitorSetup {
    socket: Option<BoundSocket>,
    names: Vec<HostName>,
    observed: Arc<StatusSource>,
}

/// The running monitor. It stops when this is dropped.
pub(crate) struct RunningMonitor {
    monitor: Option<Monitor>,
    /// Monitoring data, whether or not it is served.
    observed: Arc<StatusSource>,
}

impl RunningMonitor {
    /// Returns the address that the monitor listens on, if it does.
    pub(crate) fn address(&self) -> Option<&str> {
        self.monitor.as_ref().map(Monitor::address)
    }

    /// Connects a gateway's report to the monitoring data.
    pub(crate) fn attach(&self, control: Control<Catalog>) {
        self.observed.set_gateway(move || control.report());
    }
}

impl MonitorSetup {
    /// Binds the monitoring socket, unless the service manager passed one.
    pub(crate) fn prepare(
        options: &ServeOptions,
        inherited: Option<BoundSocket>,
        reader: &Arc<BlockReader>,
        recent: RecentErrors,
    ) -> Result<Self, Failure> {
        let configured = options.monitoring.monitor.as_ref();
        let socket = match (inherited, configured) {
            (Some(_), Some(_)) => return Err(MonitorAndInherited.into()),
            (inherited, None) => inherited,
            (None, Some(at)) => Some(at.bind()?),
        };
        match socket.as_ref().map(BoundSocket::address) {
            Some(Ok(address @ ListenAddress::Vsock { .. })) => tracing::warn!(
                reason = "monitor_exposed",
                "the monitor listens on {address}: every virtual machine can see who is connected",
            ),
            Some(Ok(address)) if !address.is_local() => tracing::warn!(
                reason = "monitor_exposed",
                "the monitor listens on {address} without TLS: anyone who can reach it sees who \
                 is connected",
            ),
            _ => {}
        }
        let budget = options.memory().total();
        let observed = Arc::new(StatusSource::new(budget, Arc::clone(reader), recent));
        Ok(Self { socket, names: options.monitoring.monitor_name.clone(), observed })
    }

    /// Connects the figures of a fetcher to the monitoring data.
    #[cfg(feature = "remote")]
    pub(crate) fn attach_fetcher(&self, fetcher: Arc<Fetcher>) {
        self.observed.set_stores(move || StoresStatus::from(fetcher.stats()));
    }

    /// Starts serving, on a thread of its own. `audit` returns the event counters.
    pub(crate) fn start(
        self,
        audit: Option<impl Fn() -> AuditCounts + Send + Sync + 'static>,
    ) -> io::Result<RunningMonitor> {
        let Self { socket, names, observed } = self;
        if let Some(counts) = audit {
            observed.set_audit(counts);
        }
        let monitor = match socket {
            Some(socket) => Some(Monitor::start(socket, names, Arc::clone(&observed))?),
            None => None,
        };
        if let Some(monitor) = &monitor {
            tracing::debug!(address = monitor.address(), "monitor started");
        }
        Ok(RunningMonitor { monitor, observed })
    }
}
