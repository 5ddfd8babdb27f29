//! Errors that end the program, and their exit codes.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use hexz_exports::{CatalogError, FolderError};
use hexz_reader::Error as SnapshotError;
use nbd_gateway::AcceptLoopFailed;
use nbd_gateway::access::RulesFileError;
use nbd_gateway::config::ConfigError;
use nbd_gateway::inherited::InheritError;
use nbd_gateway::listen::BindError;
use nbd_gateway::stdio::StdioError;
use nbd_gateway::tls::TlsFileError;
use nbd_sandbox::SandboxError;
use nbd_telemetry::escape;

use crate::commands::StatusError;
use crate::commands::output;
use crate::commands::pki::PkiError;
use crate::service::archives::TrustError;
use crate::service::audit::AuditError;
use crate::service::password::PasswordError;
use crate::settings::SettingsError;

/// Exit code if the reader of the output has closed it, as with `| head`: the one that shells
/// report for a program killed by SIGPIPE.
const CLOSED_OUTPUT: u8 = 141;

/// Error that ends the program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Usage(#[from] ConfigError),
    #[error(
        "rules ask who a client is, but clients aren't asked for a certificate: give --tls-client-ca"
    )]
    IdentityWithoutCa,
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("can't write {}: {error}", escape::name(.path))]
    Write { path: PathBuf, error: io::Error },
    #[error("can't use the password: {0}")]
    Password(#[from] PasswordError),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("can't use TLS: {0}")]
    Tls(#[from] TlsFileError),
    #[error("can't use the rules: {0}")]
    Rules(#[from] RulesFileError),
    #[error("{} is a pipe, which can be read only once", escape::name(.0))]
    Pipe(PathBuf),
    #[error(
        "the socket \"monitor\" is handed over, and --monitor is given as well: leave one of them \
         away"
    )]
    MonitorAndInherited,
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("TLS can't be switched on or off while clients are served; it takes a restart")]
    TlsToggled,
    #[error(
        "{} outside what the sandbox lets this program read; it takes a restart",
        with_verb(.0)
    )]
    OutsideSandbox(Vec<PathBuf>),
    #[error(transparent)]
    Listen(#[from] BindError),
    #[error(
        "--listen is given, but the service manager hands over sockets to listen on (LISTEN_FDS): \
         leave out one of them"
    )]
    ListenAndInherited,
    #[error(transparent)]
    InheritedSockets(#[from] InheritError),
    #[error(transparent)]
    StdioConnection(#[from] StdioError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error(transparent)]
    AcceptLoop(#[from] AcceptLoopFailed),
    #[error("can't write to the standard output: {0}")]
    Output(#[source] io::Error),
    #[error("the system refused: {0}")]
    System(#[from] io::Error),
    #[error("the demonstration failed: {0}")]
    Demo(String),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Status(#[from] StatusError),
}

impl Failure {
    /// Logs the error, and returns the exit code.
    pub(crate) fn report(self) -> ExitCode {
        if self.is_closed_output() {
            return ExitCode::from(CLOSED_OUTPUT);
        }
        tracing::error!("{self}");
        ExitCode::from(self.exit_code())
    }

    /// Returns true if the only error is that the reader of the output closed it.
    fn is_closed_output(&self) -> bool {
        match self {
            Self::Output(error) | Self::Pki(PkiError::Output(error)) => output::is_closed(error),
            _ => false,
        }
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::AcceptLoop(_)
            | Self::System(_)
            | Self::Write { .. }
            | Self::Output(_)
            | Self::Demo(_)
            | Self::Status(_) => 1,
            Self::Usage(_)
            | Self::IdentityWithoutCa
            | Self::ListenAndInherited
            | Self::MonitorAndInherited
            | Self::Catalog(_)
            | Self::Rules(_)
            | Self::Pipe(_)
            | Self::Settings(_)
            | Self::TlsToggled
            | Self::OutsideSandbox(_) => 2,
            Self::Pki(error) => error.exit_code(),
            Self::Snapshot(_) | Self::Folder(_) | Self::Password(_) | Self::Trust(_) => 3,
            Self::Tls(_) => 4,
            Self::Listen(_) | Self::InheritedSockets(_) | Self::StdioConnection(_) => 5,
            Self::Sandbox(_) => 6,
            Self::Audit(AuditError::StandardOutputTaken) => 2,
            Self::Audit(_) => 7,
        }
    }
}

/// Returns "a is" or "a, b are".
fn with_verb(paths: &[PathBuf]) -> String {
    let all: Vec<String> = paths.iter().map(|path| escape::name(path).to_string()).collect();
    format!("{} {}", all.join(", "), if all.len() == 1 { "is" } else { "are" })
}
