//! The dialer: a process that connects to stores for the gateway.
//!
//! The gateway parses archives, so its sandbox permits neither creating nor connecting sockets.
//! Before it enters the sandbox, it starts its own program again as a dialer ([`start`]) with a
//! list of servers. The dialer ([`child`]), in a sandbox of its own, resolves names, connects to
//! the servers of this list, and passes the connected sockets to the gateway
//! ([`ProcessDialer`]). A gateway that is taken over can therefore reach the stores that it was
//! started with, and nothing else.

mod addresses;
mod child;
pub(crate) mod messages;
mod process;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nbd_sandbox::{Mode, User};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

pub(crate) use addresses::refusal;
pub(crate) use child::run;
pub(crate) use process::ProcessDialer;

use messages::{DialTarget, DialerReady, DialerStart, MAX_JSON_LENGTH};

/// The subcommand that runs the dialer. It isn't part of the command line for users.
const SUBCOMMAND: &str = "dialer";
/// Variables that change how glibc resolves names. All others stay out of the dialer, since some
/// hold secrets.
const RESOLVER_VARIABLES: [&str; 2] = ["RES_OPTIONS", "LOCALDOMAIN"];
/// Time that the dialer has to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns true if these arguments of the program are those of the dialer.
pub(crate) fn is_requested(arguments: &[OsString]) -> bool {
    matches!(arguments, [_, subcommand] if subcommand == SUBCOMMAND)
}

/// Starts a dialer that connects to `targets`, pairs of host and port, and to nothing else. Its
/// sandbox is as strict as `mode`, and it switches to `user`.
///
/// Must be called before the sandbox is entered, whose plan needs the dialer's descriptor
/// (`receives_descriptors_on`), and by the main thread, as the dialer is killed at the end of the
/// thread that started it. The dialer isn't started again if it ends.
///
/// # Errors
/// The process can't be started, can't enter its sandbox, or doesn't respond in time.
pub(crate) fn start(
    targets: &[(String, u16)],
    mode: Mode,
    user: Option<&User>,
) -> io::Result<Arc<ProcessDialer>> {
    let targets = targets.iter().map(|(host, port)| DialTarget { host: host.clone(), port: *port });
    let start = DialerStart {
        parent: std::process::id(),
        mode,
        user: user.map(User::to_string),
        targets: targets.collect(),
    };
    let (socket, process, ready) = spawn(&start)?;
    tracing::debug!("dialer: {}", ready.enforced.join("; "));
    if !ready.missing.is_empty() && mode != Mode::Off {
        let reason = "sandbox_incomplete";
        tracing::warn!(reason, "dialer: not available here: {}", ready.missing.join("; "));
    }
    for (reason, text) in ready.notes {
        tracing::info!(reason, "dialer: {text}");
    }
    Ok(Arc::new(ProcessDialer::new(start.targets, socket, process)))
}

/// Starts the process, and waits until it is in its sandbox. Returns the socket to it.
pub(crate) fn spawn(start: &DialerStart) -> io::Result<(OwnedFd, Child, DialerReady)> {
    let message = serde_json::to_vec(start)?;
    if message.len() > MAX_JSON_LENGTH {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many stores"));
    }
    let flags = SocketFlags::CLOEXEC;
    let (socket, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // The running program, even if another one has replaced its file.
    let mut command = Command::new("/proc/self/exe");
    let variables = RESOLVER_VARIABLES.map(|name| (name, std::env::var_os(name)));
    let variables = variables.into_iter().filter_map(|(name, value)| Some((name, value?)));
    command
        .arg0("hexz-nbd")
        .arg(SUBCOMMAND)
        .env_clear()
        .envs(variables)
        .current_dir("/")
        .stdin(other)
        .stdout(Stdio::null());
    let mut process = command.spawn()?;
    // Closes the gateway's copy of the dialer's end, so that the end of the dialer is noticed.
    drop(command);
    match introduce(&socket, &message) {
        Ok(ready) => Ok((socket, process, ready)),
        Err(error) => {
            // It ends at the end of its input at the latest.
            drop(socket);
            drop(process.kill());
            drop(process.wait());
            Err(io::Error::new(error.kind(), format!("can't start the dialer: {error}")))
        }
    }
}

/// Sends the first message, and receives the response.
fn introduce(socket: &OwnedFd, message: &[u8]) -> io::Result<DialerReady> {
    send(socket, message, SendFlags::NOSIGNAL)?;
    set_socket_timeout(socket, Timeout::Recv, Some(START_TIMEOUT))?;
    let mut bytes = vec![0; MAX_JSON_LENGTH];
    let (length, _) = recv(socket, bytes.as_mut_slice(), RecvFlags::empty())?;
    set_socket_timeout(socket, Timeout::Recv, None)?;
    if length == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the process has ended"));
    }
    let ready: Result<DialerReady, String> =
        serde_json::from_slice(bytes.get(..length).unwrap_or_default())?;
    ready.map_err(io::Error::other)
}
