//! Options for privileges.

use clap::{Args, ValueEnum};
use nbd_sandbox::{Mode, User};
use serde::Deserialize;

use super::from_file;

#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct Sandbox {
    /// Drop all privileges that serving doesn't need, after sockets are bound
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    #[serde(deserialize_with = "from_file::choice")]
    sandbox: SandboxMode,
    /// Change to this user after sockets are bound and keys are read; requires root
    #[arg(long, value_name = "USER[:GROUP]")]
    #[serde(deserialize_with = "from_file::text")]
    pub(crate) user: Option<User>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum SandboxMode {
    /// As far as the kernel supports it; a warning lists what is missing
    #[default]
    Auto,
    /// Don't start if the kernel lacks a part of it
    Require,
    /// Keep all privileges
    Off,
}

impl Sandbox {
    /// Returns how strictly the sandbox is enforced.
    pub(crate) fn mode(&self) -> Mode {
        match self.sandbox {
            SandboxMode::Auto => Mode::Auto,
            SandboxMode::Require => Mode::Require,
            SandboxMode::Off => Mode::Off,
        }
    }
}
