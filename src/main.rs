//! `hexz-nbd`: serves Hexz snapshots read-only over NBD and TLS.
//!
//! `main` reads the settings ([`settings`], from the options that [`cli`] defines), starts
//! logging, and runs one of the [`commands`] or the [`service`].
//!
//! # The path of a request
//!
//! 1. `nbd_gateway`: [`service::serve`] runs a `Gateway`, which accepts connections (`accept`) on
//!    the sockets that [`service::sockets`] bound or took over from a service manager. With
//!    `--stdio`, the process inherits a connection.
//! 2. `admission` checks the address of the peer, or the one that a load balancer reports
//!    (`proxy`), against the rules (`access`) and the limits, and grants a handshake permit. A
//!    connection that isn't admitted is closed before a byte is sent.
//! 3. `session` runs the phases of the connection, up to step 5 under a deadline. The first is the
//!    greeting (`nbd_server::greet`). If TLS is required, STARTTLS (`nbd_server::plaintext_leg`)
//!    and the TLS handshake (`tls`) follow; state from the plaintext phase is discarded.
//! 4. The client is authorized by its certificate (`session`), and again whenever rules or
//!    certificates are reloaded ([`service`]) or have expired (`registry`).
//! 5. `nbd_server::negotiate`: the client chooses an export, and metadata contexts. It sees only
//!    those exports that the rules let it open (`session::audited_exports`), in its
//!    `hexz_exports::CatalogView` of the `Catalog`, which opens the archive if it isn't open yet.
//! 6. `nbd_server::transmit` reads and validates requests (`connection`, `request_reader`). A read
//!    of cached data is answered immediately; other requests are processed in tasks (`worker`),
//!    whose replies return to `connection` through a channel. It sends them (`reply_writer`).
//! 7. `hexz_exports`: the export (`snapshot`) divides the read into blocks (`blocks`), which are
//!    looked up in the cache (`reader`). On a miss, the block is decoded once, however many clients
//!    ask for it, by a decoder thread (`decoders`). Decoding is scheduled fairly: the client that
//!    has used the least time is next.
//! 8. `hexz_reader` looks up the block's index entry (`snapshot`, `references`), and checks,
//!    decrypts, decompresses and verifies its stored bytes, in this archive or in a parent
//!    (`archive`).
//! 9. `hexz_reader::storage` reads the stored bytes.
//!
//! All steps maintain counters, which [`monitor`] exposes.

mod cli;
mod commands;
mod exit_status;
mod hints;
mod log;
mod monitor;
mod service;
mod settings;
mod usage_error;

use std::process::ExitCode;

use exit_status::Failure;
use monitor::RecentErrors;
use settings::{Settings, Warning};

/// The allocator, jemalloc, configured in `.cargo/config.toml`. Thousands of blocks of all
/// lengths are allocated, and freed by threads that didn't allocate them; the system's allocator
/// retains much of that memory.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    #[cfg(feature = "remote")]
    if service::dialer::is_requested(&arguments) {
        return service::dialer::run();
    }
    if settings::is_stdio(&arguments) && service::sockets::redirect_stderr().is_err() {
        return ExitCode::FAILURE;
    }
    let recent = RecentErrors::default();
    let settings =
        Settings::read(&arguments).unwrap_or_else(|error| usage_error::report_and_exit(error));
    if let Err(error) = log::start(&settings.cli.log, settings.is_started_by_client(), &recent) {
        usage_error::log_unavailable(&error);
    }
    for Warning { label, text } in &settings.warnings {
        tracing::warn!(reason = label, "{text}");
    }
    let serves = settings.cli.command.is_none() && !settings.cli.file.check_config;
    if !serves && let Err(error) = commands::hangup::ignore_unless_terminal_is_closed() {
        tracing::debug!("SIGHUP will end the program: {error}");
    }
    let ended = match &settings.cli.command {
        Some(command) => commands::run(command),
        None if settings.cli.file.check_config => commands::check_config::run(&settings),
        None => service::serve(settings, recent).map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(Failure::report)
}
