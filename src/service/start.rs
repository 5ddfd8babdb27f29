//! Acquires what the service needs while it still has all privileges: reads the files, and binds
//! the sockets.

use std::path::PathBuf;
#[cfg(feature = "remote")]
use std::sync::Arc;
use std::time::Duration;

use hexz_exports::Catalog;
#[cfg(feature = "remote")]
use hexz_reader::OpenOptions;
use nbd_gateway::Policy;
use nbd_gateway::config::Config;
use nbd_gateway::listen::BoundSocket;
use rustix::process::{Resource, getrlimit, setrlimit};

use super::audit::{self, AuditTarget};
use super::monitor::MonitorSetup;
use super::notify::ManagerSocket;
#[cfg(feature = "remote")]
use super::remote::{self, ConnectedStores};
use super::sockets::Sockets;
use super::watch::WatchedFiles;
use super::{access, archives, control, hidden, pid_file};
use crate::cli::ReloadableOptions;
use crate::exit_status::Failure;
use crate::monitor::RecentErrors;
use crate::settings::{FixedOptions, Settings};

/// Resources that are acquired before privileges are dropped.
pub(super) struct Prepared {
    /// Path of the configuration file.
    pub(super) file: Option<PathBuf>,
    pub(super) fixed: FixedOptions,
    /// Options that a reload can change.
    pub(super) options: ReloadableOptions,
    /// True if a reload follows when files have changed.
    pub(super) watch: bool,
    /// Stamps of the files from before they were read.
    pub(super) files: WatchedFiles,
    pub(super) config: Config,
    /// Time for which connections are accepted after SIGTERM.
    pub(super) drain_delay: Duration,
    pub(super) policy: Policy,
    pub(super) catalog: Catalog,
    /// Stores of remote archives.
    #[cfg(feature = "remote")]
    pub(super) stores: Option<ConnectedStores>,
    pub(super) sockets: Sockets,
    /// Socket for `hexz-nbd reload`.
    pub(super) control: Option<BoundSocket>,
    /// True if the gateway listens on loopback only, since the rules admit no other clients.
    pub(super) is_loopback_only: bool,
    pub(super) manager: ManagerSocket,
    pub(super) audit: Option<AuditTarget>,
    pub(super) monitor: MonitorSetup,
}

impl Prepared {
    /// Reads the files, and binds the sockets.
    pub(super) fn new(settings: Settings, recent: RecentErrors) -> Result<Self, Failure> {
        let Settings { cli, stamp, fixed, .. } = settings;
        let (file, serve) = (cli.file.config, cli.serve);
        let (mut config, drain_delay) = (serve.config(), serve.drain_delay());
        let mut sockets = Sockets::take_inherited(&serve, &mut config)?;
        let monitor_socket = sockets.take_monitor();
        let manager = ManagerSocket::from_environment();
        let files = WatchedFiles::new(file.as_deref(), stamp, &serve.changeable);
        hidden::warn_hidden(&serve.changeable);
        let policy = access::read(&serve.changeable, &config, None)?;
        let open = archives::options(&serve.changeable.snapshots.opening)?;
        #[cfg(feature = "remote")]
        let (open, stores) = match remote::connect(&serve)? {
            Some(stores) => (OpenOptions { remote: Some(stores.archives()), ..open }, Some(stores)),
            None => (open, None),
        };
        archives::check_folder_exists(&serve.changeable.snapshots)?;
        let catalog = serve.catalog(open, serve.prefetch())?;
        tracing::debug!(
            "limits: {}; {}, drain-delay {}",
            config.limits,
            config.timeouts,
            humantime::format_duration(drain_delay),
        );
        tracing::debug!("memory: {}", serve.memory());
        access::warn_risky(&config, &policy);
        raise_descriptor_limit(&config, catalog.descriptors());
        let is_local_only = policy.rules.is_local_only();
        let is_loopback_only = config.listen.is_empty() && is_local_only && !serve.network.stdio;
        sockets.bind(&config, is_local_only, &serve.network.socket_permissions())?;
        let control = serve.network.control_socket.as_deref().map(control::bind).transpose()?;
        let audit = audit::open(&serve.audit, serve.network.stdio)?;
        let monitor = MonitorSetup::prepare(&serve, monitor_socket, catalog.reader(), recent)?;
        #[cfg(feature = "remote")]
        if let Some(stores) = &stores {
            monitor.attach_fetcher(Arc::clone(stores.archives().fetcher()));
        }
        if let Some(path) = &serve.network.pid_file {
            pid_file::write(path)?;
        }
        Ok(Self {
            file,
            fixed,
            watch: serve.watch,
            options: serve.changeable,
            files,
            config,
            drain_delay,
            policy,
            catalog,
            #[cfg(feature = "remote")]
            stores,
            sockets,
            control,
            is_loopback_only,
            manager,
            audit,
            monitor,
        })
    }
}

/// Raises the soft limit of file descriptors to the hard limit: each connection needs a
/// descriptor, and the usual 1024 is a compatibility limit for programs that use `select`.
///
/// Warns if that is fewer than clients and `archives` open archives may need.
fn raise_descriptor_limit(config: &Config, archives: usize) {
    /// Descriptors for listeners, the log, the audit and the runtime.
    const RESERVED_DESCRIPTORS: usize = 32;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("can't raise the limit of open files: {error}");
    }
    let (clients, handshakes) = (config.limits.connections, config.limits.handshakes);
    let needed = [clients, handshakes, config.limits.queue(), archives, RESERVED_DESCRIPTORS]
        .into_iter()
        .fold(0, usize::saturating_add);
    // `None` means unlimited.
    let Some(granted) = getrlimit(Resource::Nofile).current else { return };
    if usize::try_from(granted).is_ok_and(|granted| granted < needed) {
        tracing::warn!(
            reason = "few_descriptors",
            needed,
            granted,
            "too few file descriptors for {clients} clients (--max-connections), {handshakes} \
             handshakes (--max-handshakes), archives and sockets: raise the limit (LimitNOFILE=, \
             ulimit -Hn), or lower these options; otherwise some clients have to wait"
        );
    }
}
