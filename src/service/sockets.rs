//! Obtains the sockets of the gateway: it binds them, or takes over those of a service manager or
//! the single connection that the process was started with.

use std::fs::File;
use std::io::{self, stderr, stdin};
use std::os::fd::AsFd;

use rustix::fs::{FileType, fstat};
use tokio_util::sync::CancellationToken;

use hexz_exports::Catalog;
use nbd_gateway::config::Config;
use nbd_gateway::listen::{
    self, BindError, BoundSocket, InheritError, InheritedSockets, ListenAddress, SocketPermissions,
    StdioConnection, StdioError,
};
use nbd_gateway::{AcceptLoopFailed, Control, Gateway, Policy};

use crate::cli::ServeOptions;
use crate::exit_status::{Failure, fixed_exit_status, labeled_exit_status};

/// Error for addresses to listen on that are given twice.
#[derive(Debug, thiserror::Error)]
#[error(
    "--listen conflicts with the sockets passed by the service manager (LISTEN_FDS): remove one of \
     them"
)]
struct ListenAndInherited;

fixed_exit_status! {
    ListenAndInherited => USAGE, "listen_given_twice";
    AcceptLoopFailed => FAILED, "accept_loop_failed";
}

labeled_exit_status! {
    BindError => LISTEN;
    InheritError => LISTEN;
    StdioError => LISTEN;
}

/// Sockets of the gateway and its monitor. There are no listeners for the gateway if it serves a
/// single connection.
pub(crate) struct Sockets {
    connection: Option<StdioConnection>,
    listeners: Vec<BoundSocket>,
    monitor: Option<BoundSocket>,
}

impl Sockets {
    /// Takes over the sockets that the process was started with, and adds their addresses to
    /// `config`.
    pub(crate) fn take_inherited(
        options: &ServeOptions,
        config: &mut Config,
    ) -> Result<Self, Failure> {
        if options.network.stdio {
            let connection = Some(StdioConnection::take()?);
            return Ok(Self { connection, listeners: Vec::new(), monitor: None });
        }
        let inherited = InheritedSockets::take(|name| std::env::var(name).ok())?;
        if !inherited.nbd.is_empty() {
            if !config.listen.is_empty() {
                return Err(ListenAndInherited.into());
            }
            // So that they are checked like configured addresses.
            config.listen =
                inherited.nbd.iter().map(BoundSocket::address).collect::<Result<_, _>>()?;
        }
        Ok(Self { connection: None, listeners: inherited.nbd, monitor: inherited.monitor })
    }

    /// Returns the socket for monitoring, if the service manager passed one.
    pub(crate) fn take_monitor(&mut self) -> Option<BoundSocket> {
        self.monitor.take()
    }

    /// Binds the configured sockets, unless there are inherited ones.
    pub(crate) fn bind(
        &mut self,
        config: &Config,
        loopback_only: bool,
        permissions: &SocketPermissions,
    ) -> Result<(), Failure> {
        let is_inherited = !self.listeners.is_empty();
        let is_unix = |address: &ListenAddress| matches!(address, ListenAddress::Unix(_));
        if *permissions != SocketPermissions::default()
            && (is_inherited || !config.listen.iter().any(is_unix))
        {
            tracing::warn!(
                reason = "no_unix_socket",
                "--socket-mode and --socket-group have no effect: --listen names no Unix socket"
            );
        }
        if self.connection.is_none() && !is_inherited {
            self.listeners = listen::bind_all(&config.listen, loopback_only, permissions)?;
        }
        Ok(())
    }

    /// Creates the gateway. Must be called within a tokio runtime.
    pub(crate) fn into_gateway(
        self,
        config: Config,
        policy: Policy,
        catalog: Catalog,
    ) -> io::Result<BoundGateway> {
        let gateway = Gateway::new(self.listeners, config, policy, catalog)?;
        let listen = match &self.connection {
            Some(connection) => vec![connection.to_string()],
            None => gateway.addresses()?.iter().map(ToString::to_string).collect(),
        };
        Ok(BoundGateway { gateway, connection: self.connection, listen })
    }
}

/// A gateway that is ready to run.
pub(crate) struct BoundGateway {
    gateway: Gateway<Catalog>,
    connection: Option<StdioConnection>,
    listen: Vec<String>,
}

impl BoundGateway {
    /// Returns the handle for reconfiguring and querying it.
    pub(crate) fn control(&self) -> Control<Catalog> {
        self.gateway.control()
    }

    /// Returns the addresses of its sockets, for display.
    pub(crate) fn listen(&self) -> &[String] {
        &self.listen
    }

    /// Serves until `shutdown` is canceled, or, for a single connection, until that ends.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> Result<(), Failure> {
        match self.connection {
            Some(connection) => Ok(self.gateway.run_one(connection, shutdown).await?),
            None => Ok(self.gateway.run(shutdown).await?),
        }
    }
}

/// Redirects standard error to `/dev/null` if it is the client's connection: inetd uses one
/// socket for standard input, output and error. Must be called before anything is written there.
pub(crate) fn redirect_stderr() -> io::Result<()> {
    let (input, error) = (fstat(stdin().as_fd())?, fstat(stderr().as_fd())?);
    let is_socket = FileType::from_raw_mode(input.st_mode) == FileType::Socket;
    if is_socket && (input.st_dev, input.st_ino) == (error.st_dev, error.st_ino) {
        rustix::stdio::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
    }
    Ok(())
}
