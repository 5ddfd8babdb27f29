//! The subcommands, one module each, and `--check-config`.

#[cfg(feature = "remote")]
mod cache;
mod check;
pub(crate) mod check_config;
mod completions;
mod demo;
mod digest;
mod doctor;
pub(crate) mod hangup;
mod health;
mod inspect;
mod man;
mod monitor_client;
mod output;
mod pki;
mod reload;
mod signals;
mod top;
mod trace;
mod tree;
mod verify;
#[cfg(feature = "remote")]
mod warm;

use std::process::ExitCode;

use crate::cli::Command;
use crate::exit_status::Failure;

/// Runs a subcommand.
pub(crate) fn run(command: &Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Demo(options) => demo::run(options).map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "remote")]
        Command::Cache(options) => cache::run(options),
        Command::Check(options) => check::run(options),
        Command::Pki(options) => Ok(pki::run(options)?),
        Command::Verify(options) => verify::run(options),
        Command::Doctor(options) => doctor::run(options),
        Command::Inspect(options) => inspect::run(options),
        Command::Digest(options) => digest::run(options).map(|()| ExitCode::SUCCESS),
        Command::Tree(options) => tree::run(options).map(|()| ExitCode::SUCCESS),
        Command::Top(options) => top::run(options),
        Command::Health(options) => health::run(options),
        Command::Trace(options) => trace::run(options),
        #[cfg(feature = "remote")]
        Command::Warm(options) => warm::run(options),
        Command::Reload(options) => reload::run(options),
        Command::Man(options) => man::run(options).map(|()| ExitCode::SUCCESS),
        Command::Completions(options) => completions::run(options).map(|()| ExitCode::SUCCESS),
    }
}
