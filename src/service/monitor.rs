//! Serves monitoring data over HTTP, if `--monitor` asks for it.

use std::io;
use std::sync::Arc;

use crate::cli::HostName;
#[cfg(feature = "remote")]
use crate::monitor::StoresStatus;
use crate::monitor::{
    AuditCounts, Monitor, MonitorAuth, MonitorAuthFiles, RecentErrors, StatusSource,
};
use hexz_exports::{BlockReader, Catalog};
use nbd_gateway::Control;
use nbd_gateway::listen::{BoundSocket, ListenAddress};
use nbd_gateway::tls::TlsFiles;
#[cfg(feature = "remote")]
use object_reader::Fetcher;

use tokio::task::spawn_blocking;

use super::watch::WatchedFiles;
use crate::cli::{MonitorOptions, ServeOptions};
use crate::exit_status::{ExitStatus, Failure, fixed_exit_status};

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
    auth: Arc<MonitorAuth>,
    /// Stamps of the files of `auth` from before they were read.
    auth_files: WatchedFiles,
    observed: Arc<StatusSource>,
}

/// The running monitor. It stops when this is dropped.
pub(crate) struct RunningMonitor {
    monitor: Option<Monitor>,
    auth: Arc<MonitorAuth>,
    auth_files: WatchedFiles,
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
        let (report, activity) = (control.clone(), control.clone());
        self.observed.set_gateway(
            move || report.report(),
            move || activity.activity(),
            move || control.exports().status(),
        );
    }

    /// Returns a function that returns the fault of the program that only a restart cures, if there
    /// is one.
    pub(crate) fn fault(&self) -> impl Fn() -> Option<&'static str> + Send + use<> {
        let observed = Arc::clone(&self.observed);
        move || observed.fault()
    }

    /// Returns a task that reads the monitor's certificate, key and token again when their files
    /// have changed.
    pub(crate) fn reload_auth(&self) -> impl Future<Output = ()> + Send + use<> {
        let (auth, mut files) = (Arc::clone(&self.auth), self.auth_files.clone());
        async move {
            if files == WatchedFiles::default() {
                return;
            }
            loop {
                files.changed().await;
                files = files.current().await;
                let auth = Arc::clone(&auth);
                match spawn_blocking(move || auth.reload()).await {
                    Ok(Ok(())) => tracing::info!("monitor: certificate and token reloaded"),
                    Ok(Err(error)) => tracing::error!(
                        reason = "monitor_auth_not_reloaded",
                        cause = error.label(),
                        "monitor: keeping the previous certificate and token: {error}"
                    ),
                    // The runtime is shutting down.
                    Err(_) => return,
                }
            }
        }
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
        let files = auth_files(&options.monitoring);
        let stamps = WatchedFiles::of(files.paths());
        let auth = MonitorAuth::load(files)?;
        if let Some(Ok(address)) = socket.as_ref().map(BoundSocket::address) {
            warn_exposed(&address, &auth);
        }
        let budget = options.memory().total();
        let observed = Arc::new(StatusSource::new(budget, Arc::clone(reader), recent));
        Ok(Self {
            socket,
            names: options.monitoring.monitor_name.clone(),
            auth: Arc::new(auth),
            auth_files: stamps,
            observed,
        })
    }

    /// Connects the figures of a fetcher to the monitoring data. `fault` returns what prevents
    /// connections until a restart, if something does.
    #[cfg(feature = "remote")]
    pub(crate) fn attach_fetcher(
        &self,
        fetcher: Arc<Fetcher>,
        fault: impl Fn() -> Option<&'static str> + Send + Sync + 'static,
    ) {
        self.observed.set_stores(move || StoresStatus::from(fetcher.stats()), fault);
    }

    /// Starts serving, on a thread of its own. `audit` returns the event counters.
    pub(crate) fn start(
        self,
        audit: Option<impl Fn() -> AuditCounts + Send + Sync + 'static>,
    ) -> io::Result<RunningMonitor> {
        let Self { socket, names, auth, auth_files, observed } = self;
        if let Some(counts) = audit {
            observed.set_audit(counts);
        }
        let monitor = match socket {
            Some(socket) => {
                Some(Monitor::start(socket, names, Arc::clone(&auth), Arc::clone(&observed))?)
            }
            None => None,
        };
        if let Some(monitor) = &monitor {
            tracing::debug!(address = monitor.address(), "monitor started");
        }
        Ok(RunningMonitor { monitor, auth, auth_files, observed })
    }
}

/// Returns the files with the monitor's certificate, key and token.
pub(crate) fn auth_files(options: &MonitorOptions) -> MonitorAuthFiles {
    let pair = options.monitor_tls_cert.clone().zip(options.monitor_tls_key.clone());
    MonitorAuthFiles {
        tls: pair.map(|(certificate, key)| TlsFiles { certificate, key, clients: None }),
        token: options.monitor_token_file.clone(),
    }
}

/// Warns if other machines can read from the monitor without a token, or read along.
fn warn_exposed(address: &ListenAddress, auth: &MonitorAuth) {
    let reason = "monitor_exposed";
    match (address, auth.has_tls(), auth.has_token()) {
        (ListenAddress::Vsock { .. }, _, false) => tracing::warn!(
            reason,
            "the monitor listens on {address}: every virtual machine can see who is connected",
        ),
        (address, _, _) if address.is_local() => {}
        (_, true, true) => {}
        (_, false, false) => tracing::warn!(
            reason,
            "the monitor listens on {address} without TLS: anyone who can reach it sees who is \
             connected; use --monitor-tls-cert, --monitor-tls-key and --monitor-token-file"
        ),
        (_, true, false) => tracing::warn!(
            reason,
            "the monitor listens on {address} without a token: anyone who can reach it sees who is \
             connected; use --monitor-token-file"
        ),
        (_, false, true) => tracing::warn!(
            reason,
            "the monitor listens on {address} without TLS: its token and data can be read in \
             transit; use --monitor-tls-cert and --monitor-tls-key"
        ),
    }
}
