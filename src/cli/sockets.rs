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
#[command(next_help_heading = "Network")]
pub(crate) struct Network {
    /// Load balancers, in the format of --allow. Their connections must begin with a PROXY header
    /// of version 2; the client's address in it is used for access rules, limits and the log. List
    /// only trusted peers: they can claim any address [comma-separated, repeatable]
    #[arg(
        long, value_name = "CIDR", value_delimiter = ',', value_parser = trimmed::<PeerMatcher>,
        help_heading = "Access"
    )]
    #[serde(deserialize_with = "from_file::comma_list")]
    pub(crate) proxy_from: Vec<PeerMatcher>,
    /// Serve other machines without TLS: traffic can be read and modified in transit
    #[arg(long, help_heading = "TLS")]
    pub(crate) insecure_no_tls: bool,
    /// Address to listen on: ADDRESS:PORT, or ADDRESS alone for port 10809; unix:PATH; vsock:PORT or
    /// vsock:CID:PORT. A link-local address includes its interface: [fe80::1%eth0]:PORT [repeatable;
    /// default: port 10809 of all addresses, or of loopback if only this machine may connect]
    #[arg(long, value_name = "WHERE", value_parser = os_text(ListenAddress::parse))]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) listen: Vec<ListenAddress>,
    /// Permissions of the Unix sockets of --listen, in octal digits such as 0660; users with write
    /// permission can connect [default: according to the umask]
    #[arg(long, value_name = "MODE")]
    #[serde(deserialize_with = "from_file::text")]
    socket_mode: Option<SocketMode>,
    /// Group of the Unix sockets of --listen, by name or number [default: that of this process]
    #[arg(long, value_name = "GROUP")]
    #[serde(deserialize_with = "from_file::text")]
    socket_group: Option<SocketGroup>,
    /// Write the process ID to this file when sockets are bound and clients can connect. An
    /// existing file is replaced, and the file isn't removed on exit
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Accept "hexz-nbd reload" on this Unix socket, which reports whether the reload succeeded.
    /// Only root and the user that starts the server can connect to it
    #[arg(long, value_name = "PATH")]
    pub(crate) control_socket: Option<PathBuf>,
    /// Serve a single connection on standard input and output, for inetd, ssh, and clients that
    /// start their server themselves.
    ///
    /// Standard input is a socket, or both are pipes. Access rules apply to the address of a TCP
    /// connection; Unix sockets and pipes count as this machine. Log lines go to standard error,
    /// unless that is the same socket. The exit status is 0 however the connection ends.
    #[arg(long)]
    #[serde(skip)]
    pub(crate) stdio: bool,
}

impl Network {
    /// Returns the permissions of the Unix sockets that are created.
    pub(crate) fn socket_permissions(&self) -> SocketPermissions {
        SocketPermissions { mode: self.socket_mode, group: self.socket_group.clone() }
    }
}
