//! How clients come in: by sockets that are bound here, by those that a service manager hands
//! over, or by the one connection that the program was started with.

use std::fs::File;
use std::io::{self, stderr, stdin};
use std::os::fd::AsFd;

use rustix::fs::{FileType, fstat};
use tokio_util::sync::CancellationToken;

use hexz_nbd::config::Config;
use hexz_nbd::exports::Catalog;
use hexz_nbd::gateway::handed::Handed;
use hexz_nbd::gateway::listen::{self, Bound, ListenAddress, SocketRights};
use hexz_nbd::gateway::stdio::Stdio;
use hexz_nbd::gateway::{Gateway, Policy};

use crate::cli::Serve;
use crate::failure::Failure;

/// What was there when the program was started.
pub(crate) enum Door {
    /// One connection; nobody listens.
    Connection(Stdio),
    /// Nothing, or sockets.
    Sockets(Handed),
}

/// What the gateway works with.
pub(crate) enum Entrance {
    Connection(Stdio),
    Sockets(Vec<Bound>),
}

impl Door {
    /// Takes over what was there. `config` is told where it is.
    pub(crate) fn find(options: &Serve, config: &mut Config) -> Result<Self, Failure> {
        if options.stdio() {
            return Ok(Self::Connection(Stdio::take()?));
        }
        let handed = Handed::take(|name| std::env::var(name).ok())?;
        if !handed.nbd.is_empty() {
            if !config.listen.is_empty() {
                return Err(Failure::ListenAndHanded);
            }
            // So that they are judged as if they had been asked for.
            config.listen = handed.nbd.iter().map(Bound::address).collect::<Result<_, _>>()?;
        }
        Ok(Self::Sockets(handed))
    }

    /// The socket on which it is to be shown what goes on, if one was handed over.
    pub(crate) fn monitor(&mut self) -> Option<Bound> {
        match self {
            Self::Connection(_) => None,
            Self::Sockets(handed) => handed.monitor.take(),
        }
    }

    /// Binds sockets, unless that has been done.
    pub(crate) fn open(
        self,
        config: &Config,
        loopback_only: bool,
        rights: &SocketRights,
    ) -> Result<Entrance, Failure> {
        let makes_one = |address: &ListenAddress| matches!(address, ListenAddress::Unix(_));
        let is_handed = matches!(&self, Self::Sockets(handed) if !handed.nbd.is_empty());
        if *rights != SocketRights::default() && (is_handed || !config.listen.iter().any(makes_one))
        {
            tracing::warn!(
                "--socket-mode and --socket-group are for Unix sockets of --listen, of which there \
                 are none",
            );
        }
        match self {
            Self::Connection(connection) => Ok(Entrance::Connection(connection)),
            Self::Sockets(handed) if handed.nbd.is_empty() => {
                let sockets = listen::bind_all(&config.listen, loopback_only, rights)?;
                Ok(Entrance::Sockets(sockets))
            }
            Self::Sockets(handed) => Ok(Entrance::Sockets(handed.nbd)),
        }
    }
}

impl Entrance {
    /// Makes a gateway of it. Call it within a tokio runtime.
    pub(crate) fn open(self, config: Config, policy: Policy, catalog: Catalog) -> io::Result<Open> {
        let (connection, sockets) = match self {
            Self::Connection(connection) => (Some(connection), Vec::new()),
            Self::Sockets(sockets) => (None, sockets),
        };
        let gateway = Gateway::new(sockets, config, policy, catalog)?;
        let listen = match &connection {
            Some(connection) => vec![connection.to_string()],
            None => gateway.addresses()?.iter().map(ToString::to_string).collect(),
        };
        Ok(Open { gateway, connection, listen })
    }
}

/// A gateway that clients can come in by.
pub(crate) struct Open {
    pub(crate) gateway: Gateway<Catalog>,
    connection: Option<Stdio>,
    /// Where they do, for people.
    pub(crate) listen: Vec<String>,
}

impl Open {
    /// Serves until it is told to end, or its one client is gone.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> Result<(), Failure> {
        match self.connection {
            Some(connection) => Ok(self.gateway.run_one(connection, shutdown).await?),
            None => Ok(self.gateway.run(shutdown).await?),
        }
    }
}

/// Keeps what is said to people out of the client's connection: inetd makes one socket of
/// standard input, output and error. Call it before anything is said.
pub(crate) fn spare_the_client() -> io::Result<()> {
    let (input, error) = (fstat(stdin().as_fd())?, fstat(stderr().as_fd())?);
    let is_socket = FileType::from_raw_mode(input.st_mode) == FileType::Socket;
    if is_socket && (input.st_dev, input.st_ino) == (error.st_dev, error.st_ino) {
        rustix::stdio::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
    }
    Ok(())
}
