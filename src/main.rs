//! `hexz-nbd`: serves Hexz snapshots read-only over NBD and TLS.
//!
//! `main` reads the settings ([`settings`], from the options that [`cli`] defines), starts
//! logging, and runs one of the [`commands`] or the [`service`].
//!
//! # The path of a request
//!
//! 1. `nbd_gateway::listen` accepts a connection, on a socket that [`service::sockets`] bound or
//!    took over from a service manager. With `--stdio`, the process inherits a connection.
//! 2. `nbd_gateway::access` checks the address of the peer, or the one that a load balancer
//!    reports. A connection that isn't admitted is closed before a byte is sent.
//! 3. `nbd_gateway` assigns it a handshake permit and a deadline.
//! 4. `nbd_server` sends the greeting, and handles STARTTLS if TLS is required. `nbd_gateway::tls`
//!    performs the TLS handshake and authenticates the client. State from the plaintext phase is
//!    discarded.
//! 5. `nbd_server` negotiates: the client chooses one of the exports (`hexz_exports`) that the
//!    rules let it open, and metadata contexts. The client is authorized again whenever rules or
//!    certificates are reloaded ([`service`]) or have expired.
//! 6. `nbd_server::transmit` validates requests, processes them concurrently, and sends the
//!    replies.
//! 7. `hexz_exports` looks up decoded blocks in the cache. On a miss, the block is decoded once,
//!    however many clients ask for it, by a decoder thread. Decoding is scheduled fairly: the
//!    client that has used the least time is next.
//! 8. `hexz_reader` looks up the block's index entry, and checks, decrypts, decompresses and
//!    verifies its stored bytes, in this archive or in a parent.
//! 9. `hexz_reader::storage` reads the stored bytes.
//!
//! All steps maintain counters, which [`monitor`] exposes.

mod cli;
mod commands;
mod exit_status;
mod log;
mod monitor;
mod service;
mod settings;

use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;

use cli::Cli;
use exit_status::Failure;
use monitor::RecentErrors;
use settings::OptionSource;

/// The allocator, jemalloc, configured in `.cargo/config.toml`. Thousands of blocks of all
/// lengths are allocated, and freed by threads that didn't allocate them; the system's allocator
/// retains much of that memory.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let source = OptionSource::of_process();
    if source.is_stdio() && service::sockets::redirect_stderr().is_err() {
        return ExitCode::FAILURE;
    }
    let recent = RecentErrors::default();
    let settings = source.read().unwrap_or_else(|refused| refused.report_and_exit());
    if let Err(error) = log::start(&settings.cli.log, &recent) {
        Cli::command().error(ErrorKind::InvalidValue, error.to_string()).exit();
    }
    for note in &settings.warnings {
        tracing::warn!("{note}");
    }
    let ended = match &settings.cli.command {
        Some(command) => commands::run(command),
        None if settings.cli.file.check_config => commands::check_config::run(&settings),
        None => service::serve(source, settings, recent).map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(Failure::report)
}
