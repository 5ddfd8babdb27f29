//! Options for privileges, and the sandbox plan that follows from all options.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use nbd_gateway::listen::ListenAddress;
use nbd_sandbox::{Mode, Plan, User};

use super::monitor::MonitorAt;
use super::{Changeable, Serve};
use crate::service::{archives, password};

#[derive(Debug, Args)]
pub(crate) struct Sandbox {
    /// Give up all rights that serving doesn't need, once sockets are bound
    #[arg(long, value_enum, value_name = "MODE", default_value_t, help_heading = "Sandbox")]
    sandbox: SandboxMode,
    /// Go on as this user, once sockets are bound and keys are read; takes root
    #[arg(long, value_name = "USER[:GROUP]", help_heading = "Sandbox")]
    user: Option<User>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum SandboxMode {
    /// As far as the kernel can; a warning says what is missing
    #[default]
    Auto,
    /// Don't start if a part of it is missing
    Require,
    /// Keep all rights
    Off,
}

impl Serve {
    /// Returns the plan of what the program still needs inside the sandbox.
    pub(crate) fn plan(&self) -> Plan {
        let mode = match self.sandbox.sandbox {
            SandboxMode::Auto => Mode::Auto,
            SandboxMode::Require => Mode::Require,
            SandboxMode::Off => Mode::Off,
        };
        let socket = |address: &ListenAddress| match address {
            ListenAddress::Unix(path) => Some(path.clone()),
            ListenAddress::Tcp(_) | ListenAddress::Vsock { .. } => None,
        };
        let plan = Plan {
            mode,
            user: self.sandbox.user.clone(),
            appended: self.audit.file().map(Path::to_owned).into_iter().collect(),
            sockets: self
                .network
                .listen
                .iter()
                .chain(self.monitoring.listen().and_then(MonitorAt::address))
                .filter_map(socket)
                .collect(),
            ..Plan::default()
        };
        self.changeable.add_to(plan)
    }
}

impl Changeable {
    /// Adds all files and folders that these options name, and that are read now or later.
    pub(crate) fn add_to(&self, plan: Plan) -> Plan {
        let opening = &self.snapshots.opening;
        // A password from a pipe isn't read again.
        let password =
            password::file(opening.password_file.as_deref()).filter(|path| path.is_file());
        let files = self.policy_files().into_iter().chain(password);
        let reloaded = plan.reloaded.iter().cloned().chain(files).collect();
        self.snapshots.add_to(Plan { reloaded, ..plan })
    }

    /// Returns the files that determine who has access, and which archives may be opened.
    pub(crate) fn policy_files(&self) -> Vec<PathBuf> {
        let tls = self.tls.files();
        let tls = tls.iter().flat_map(|(files, _)| files.paths().cloned());
        let rules = self.access.file().cloned();
        tls.chain(rules).chain(archives::files(&self.snapshots.opening)).collect()
    }
}
