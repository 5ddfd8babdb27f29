//! Options for the addresses to listen on and the sockets there.

use std::path::PathBuf;

use clap::Args;
use nbd_gateway::access::PeerMatcher;
use nbd_gateway::listen::{ListenAddress, SocketGroup, SocketMode, SocketPermissions};
use serde::Deserialize;

use super::from_file;
use super::values::{os_text, trimmed};

#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct Network {
    /// Load balancers that say which client they forward: places as for --allow. Whoever connects
    /// from there has to send a PROXY header of version 2 first; the client's address in it is
    /// judged, counted and logged instead. Name nobody whom you don't trust to tell the truth
    /// [comma-separated, repeatable]
    #[arg(
        long, value_name = "CIDR", value_delimiter = ',', value_parser = trimmed::<PeerMatcher>,
        help_heading = "Access"
    )]
    #[serde(deserialize_with = "from_file::comma_list")]
    pub(crate) proxy_from: Vec<PeerMatcher>,
    /// Serve other machines without TLS: anyone on the way can read and change everything
    #[arg(long, help_heading = "TLS")]
    pub(crate) insecure_no_tls: bool,
    /// Where to listen: ADDRESS:PORT, or ADDRESS alone for port 10809; unix:PATH; vsock:PORT or
    /// vsock:CID:PORT. A link-local address takes its interface: [fe80::1%eth0]:PORT [repeatable;
    /// default: port 10809 of every address, or of loopback if only
    /// this machine may connect]
    #[arg(
        long, value_name = "WHERE", value_parser = os_text(ListenAddress::parse),
        help_heading = "Network"
    )]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) listen: Vec<ListenAddress>,
    /// Permissions of the Unix sockets of --listen, in octal digits such as 0660: who may write
    /// to one may come in [default: by the umask]
    #[arg(long, value_name = "MODE", help_heading = "Network")]
    #[serde(deserialize_with = "from_file::text")]
    socket_mode: Option<SocketMode>,
    /// Group of the Unix sockets of --listen, by name or number [default: this process's]
    #[arg(long, value_name = "GROUP", help_heading = "Network")]
    #[serde(deserialize_with = "from_file::text")]
    socket_group: Option<SocketGroup>,
    /// Write the number of this process to this file as soon as sockets are bound: from then on
    /// clients can connect. It is replaced if it is there, and stays behind at the end
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Serve the one connection that standard input is, or that standard input and output
    /// are, and end with it: for inetd, ssh, and clients that start their server themselves.
    ///
    /// Standard input is a socket, or else both are pipes. A TCP connection is judged by its
    /// address like any other; a Unix socket and pipes come from this machine. Log lines go to
    /// standard error, unless that is the same socket. The exit code is 0 whatever becomes of
    /// the connection.
    #[arg(long, help_heading = "Network")]
    #[serde(skip)]
    pub(crate) stdio: bool,
}

impl Network {
    /// Returns the permissions of the Unix sockets that are created.
    pub(crate) fn socket_permissions(&self) -> SocketPermissions {
        SocketPermissions { mode: self.socket_mode, group: self.socket_group.clone() }
    }
}
