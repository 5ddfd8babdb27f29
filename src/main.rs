//! Entry point of `hexz-nbd`: reads the settings, sets up logging, and runs the gateway or a
//! command.

mod cli;
mod commands;
mod failure;
mod log;
mod monitor;
mod service;
mod settings;

use std::process::ExitCode;

use crate::monitor::RecentErrors;
use clap::CommandFactory;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use commands::{
    check, check_config, completions, demo, digest, doctor, inspect, man, pki, top, verify,
};
use settings::Source;

/// The allocator, jemalloc, configured in `.cargo/config.toml`. Thousands of blocks of all
/// lengths are allocated, and freed by threads that didn't allocate them; the system's allocator
/// retains much of that memory.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Exit code if the reader of the output has closed it, as with `| head`: the one that shells
/// report for a program killed by SIGPIPE.
const CLOSED_OUTPUT: u8 = 141;

fn main() -> ExitCode {
    let source = Source::of_process();
    if source.is_for_one_client() && service::sockets::spare_the_client().is_err() {
        return ExitCode::FAILURE;
    }
    let recent = RecentErrors::default();
    let settings = source.read().unwrap_or_else(|refused| refused.exit());
    if let Err(error) = log::start(&settings.cli.log, &recent) {
        Cli::command().error(ErrorKind::InvalidValue, error.to_string()).exit();
    }
    for note in &settings.notes {
        tracing::warn!("{note}");
    }
    let ended = match &settings.cli.command {
        Some(Command::Demo(options)) => demo::run(options).map(|()| ExitCode::SUCCESS),
        Some(Command::Check(options)) => check::run(options),
        Some(Command::Pki(options)) => {
            pki::run(options).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Some(Command::Verify(options)) => verify::run(options),
        Some(Command::Doctor(options)) => doctor::run(options),
        Some(Command::Inspect(options)) => inspect::run(options),
        Some(Command::Digest(options)) => digest::run(options).map(|()| ExitCode::SUCCESS),
        Some(Command::Top(options)) => top::run(options),
        Some(Command::Man(options)) => man::run(options).map(|()| ExitCode::SUCCESS),
        Some(Command::Completions(options)) => {
            completions::run(options).map(|()| ExitCode::SUCCESS)
        }
        None if settings.cli.file.check_config => check_config::run(&settings),
        None => service::serve(source, settings, recent).map(|()| ExitCode::SUCCESS),
    };
    match ended {
        Ok(code) => code,
        Err(failure) if failure.is_closed_output() => ExitCode::from(CLOSED_OUTPUT),
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
