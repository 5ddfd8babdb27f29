//! Exit codes. Each error that can end the program has its own, next to its definition; a
//! [`Failure`] is any of them.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use nbd_telemetry::escape;

/// Exit code if a command found faults, or failed for a reason without a code of its own.
pub(crate) const FAILED: u8 = 1;
/// Exit code if the command line or the configuration file is wrong.
pub(crate) const USAGE: u8 = 2;
/// Exit code if an archive, a password, a key or a list of digests can't be used.
pub(crate) const ARCHIVE: u8 = 3;
/// Exit code if certificate or key can't be used.
pub(crate) const TLS: u8 = 4;
/// Exit code if sockets can't be listened on or taken over.
pub(crate) const LISTEN: u8 = 5;
/// Exit code if privileges can't be dropped.
pub(crate) const SANDBOX: u8 = 6;
/// Exit code if the audit file can't be appended to.
pub(crate) const AUDIT: u8 = 7;
/// Exit code if the reader of the output has closed it, as with `| head`: the one that shells
/// report for a program killed by SIGPIPE.
const CLOSED_OUTPUT: u8 = 141;

/// An error that can end the program.
pub(crate) trait ExitStatus: fmt::Debug + fmt::Display + Send + Sync {
    /// Returns the exit code of the program.
    fn exit_status(&self) -> u8;

    /// Returns the label of the error: the `reason` of its log line, listed in
    /// `docs/troubleshooting.md`.
    fn label(&self) -> &'static str {
        match self.exit_status() {
            USAGE => "usage",
            ARCHIVE => "archive",
            TLS => "tls",
            LISTEN => "listen",
            SANDBOX => "sandbox",
            AUDIT => "audit",
            _ => "failed",
        }
    }

    /// Returns advice for the error, such as the option that helps: the `hint` of its log line.
    fn hint(&self) -> Option<&'static str> {
        None
    }

    /// Returns true if the only error is that the reader of the output closed it.
    fn is_closed_output(&self) -> bool {
        false
    }
}

/// Implements [`ExitStatus`] for errors that always have the same exit code and label.
macro_rules! fixed_exit_status {
    ($($error:ty => $code:ident, $label:literal;)+) => {$(
        impl $crate::exit_status::ExitStatus for $error {
            fn exit_status(&self) -> u8 {
                $crate::exit_status::$code
            }

            fn label(&self) -> &'static str {
                $label
            }
        }
    )+};
}
pub(crate) use fixed_exit_status;

/// Implements [`ExitStatus`] for errors of libraries that have labels of their own, and always the
/// same exit code.
macro_rules! labeled_exit_status {
    ($($error:ty => $code:ident;)+) => {$(
        impl $crate::exit_status::ExitStatus for $error {
            fn exit_status(&self) -> u8 {
                $crate::exit_status::$code
            }

            fn label(&self) -> &'static str {
                <$error>::label(self)
            }
        }
    )+};
}
pub(crate) use labeled_exit_status;

fixed_exit_status! {
    SystemError => FAILED, "system_error";
    WriteError => FAILED, "write_failed";
}

/// Error that ends the program.
#[derive(Debug)]
pub(crate) struct Failure(Box<dyn ExitStatus>);

impl Failure {
    /// Logs the error, and returns the exit code.
    pub(crate) fn report(self) -> ExitCode {
        if self.0.is_closed_output() {
            return ExitCode::from(CLOSED_OUTPUT);
        }
        self.log();
        ExitCode::from(self.exit_status())
    }

    /// Logs the error with its label and hint.
    pub(crate) fn log(&self) {
        tracing::error!(reason = self.label(), hint = self.hint(), "{self}");
    }

    /// Returns the label of the error.
    pub(crate) fn label(&self) -> &'static str {
        self.0.label()
    }

    /// Returns the exit code of the program.
    pub(crate) fn exit_status(&self) -> u8 {
        self.0.exit_status()
    }

    /// Returns advice for the error, if there is any.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        self.0.hint()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<E: ExitStatus + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

/// Error of a system call that no other error describes.
#[derive(Debug, thiserror::Error)]
#[error("system error: {0}")]
struct SystemError(io::Error);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        SystemError(error).into()
    }
}

/// Error of a file that can't be written.
#[derive(Debug, thiserror::Error)]
#[error("can't write {}: {error}", escape::path(.path))]
pub(crate) struct WriteError {
    pub(crate) path: PathBuf,
    pub(crate) error: io::Error,
}

/// Error of the standard output.
#[derive(Debug, thiserror::Error)]
#[error("can't write to standard output: {0}")]
pub(crate) struct OutputError(pub(crate) io::Error);

impl ExitStatus for OutputError {
    fn exit_status(&self) -> u8 {
        FAILED
    }

    fn label(&self) -> &'static str {
        "output_failed"
    }

    fn is_closed_output(&self) -> bool {
        is_closed(&self.0)
    }
}

/// Returns true if the reader of the output has closed it, as with `| head`.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}
