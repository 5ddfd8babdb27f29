//! `hexz-nbd reload`: asks a running server for a reload, and reports the result.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nbd_telemetry::escape;

use crate::cli::Reload;
use crate::commands::output;
use crate::exit_status::{Failure, fixed_exit_status};
use crate::service::control::{Activation, RELOAD, ReloadReply};

/// Maximum length of a reply, in bytes.
const MAX_REPLY: u64 = 1024 * 1024;

/// Reason for which there is no result.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error("can't reach a server at {}: {error}{}", escape::path(.path), connect_hint(.error))]
    Connect { path: PathBuf, error: io::Error },
    #[error("the server at {} doesn't answer: {error}", escape::path(.path))]
    Silent { path: PathBuf, error: io::Error },
    #[error("the server at {} is shutting down, or isn't hexz-nbd", escape::path(.0))]
    Closed(PathBuf),
}

fixed_exit_status! { ControlError => FAILED, "control_socket"; }

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; a server creates this socket with --control-socket",
        io::ErrorKind::ConnectionRefused => "; the server has ended",
        io::ErrorKind::PermissionDenied => "; run this as root, or as the server's user",
        _ => "",
    }
}

/// Requests a reload, and prints what it changed. The exit status is that of the result.
pub(crate) fn run(options: &Reload) -> Result<ExitCode, Failure> {
    let path = &options.socket;
    let mut replies = Replies::request(path, options.timeout)?;
    match replies.next()? {
        Some(ReloadReply::Activated(activation)) => print_activation(&activation)?,
        Some(ReloadReply::Failed { exit_status, reason, hint, message }) => {
            tracing::error!(reason, hint, "{message}");
            return Ok(ExitCode::from(exit_status));
        }
        Some(ReloadReply::Served { .. }) | None => {
            return Err(ControlError::Closed(path.clone()).into());
        }
    }
    match replies.next() {
        Ok(Some(ReloadReply::Failed { exit_status, reason, hint, message })) => {
            tracing::error!(reason, hint, "{message}");
            Ok(ExitCode::from(exit_status))
        }
        Ok(Some(ReloadReply::Served { exports })) => {
            output::print(format!("serving {}\n", escape::text(&exports)))?;
            Ok(ExitCode::SUCCESS)
        }
        Ok(Some(ReloadReply::Activated(_)) | None) => {
            Err(ControlError::Closed(path.clone()).into())
        }
        Err(ControlError::Silent { error, .. }) if is_timeout(&error) => {
            output::print("archives are still being opened; the server's log has the result\n")?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error.into()),
    }
}

fn print_activation(activation: &Activation) -> Result<(), Failure> {
    let Activation { open_to, dropped, changes, needs_restart } = activation;
    let mut lines = format!("reloaded: open to {open_to}");
    match dropped {
        0 => {}
        1 => lines.push_str("; 1 client dropped"),
        more => lines.push_str(&format!("; {more} clients dropped")),
    }
    lines = escape::text(&lines).to_string();
    for change in changes {
        lines.push_str(&format!("\n  {}", escape::text(change)));
    }
    if !needs_restart.is_empty() {
        let options = needs_restart.join(", ");
        lines.push_str(&format!("\nchanges that need a restart: {}", escape::text(&options)));
    }
    output::print(lines + "\n")
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Replies of a server to a request.
struct Replies<'a> {
    path: &'a Path,
    stream: BufReader<UnixStream>,
    deadline: Instant,
}

impl<'a> Replies<'a> {
    /// Connects to the server, and sends the request.
    fn request(path: &'a Path, timeout: Duration) -> Result<Self, ControlError> {
        let failed = |error| ControlError::Connect { path: path.to_owned(), error };
        let mut stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        stream.write_all(RELOAD).map_err(failed)?;
        let deadline = Instant::now() + timeout;
        Ok(Self { path, stream: BufReader::new(stream), deadline })
    }

    /// Returns the next reply; `None` if there is no further one.
    fn next(&mut self) -> Result<Option<ReloadReply>, ControlError> {
        let failed = |error| ControlError::Silent { path: self.path.to_owned(), error };
        let left = self.deadline.saturating_duration_since(Instant::now());
        // Zero would mean to wait forever.
        let left = left.max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left)).map_err(failed)?;
        let mut line = Vec::new();
        let limited = &mut self.stream.by_ref().take(MAX_REPLY);
        limited.read_until(b'\n', &mut line).map_err(failed)?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(|error| failed(error.into()))
    }
}
