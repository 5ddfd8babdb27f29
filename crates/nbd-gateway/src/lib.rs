//! A front end for read-only NBD servers: it listens, admits, authenticates and authorizes clients,
//! passes them to the engine ([`nbd_server`]), and shuts down gracefully. It serves any set of exports
//! ([`ExportCatalog`](nbd_server::ExportCatalog)), and needs a Tokio runtime with
//! I/O and time enabled. Linux only.
//!
//! # Quick start
//!
//! [`listen::bind_all`] binds sockets, [`Gateway::new`] takes them with a [`Config`](config::Config),
//! a [`Policy`] and the exports, and [`Gateway::run`] serves until its token is cancelled:
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nbd_gateway::access::Rules;
//! use nbd_gateway::config::Config;
//! use nbd_gateway::listen::{SocketPermissions, bind_all};
//! use nbd_gateway::{CancellationToken, Gateway, Policy};
//! use nbd_server::{BytesExport, ExportSet};
//!
//! let config = Config { listen: vec!["127.0.0.1:0".parse()?], ..Config::default() };
//! // Clients on this machine only, without TLS. See `tls::load` for TLS.
//! let policy = Policy { rules: Rules::default(), tls: None };
//! config.check(&policy.rules, policy.tls.is_some())?;
//! let sockets = bind_all(&config.listen, true, &SocketPermissions::default())?;
//! let exports = ExportSet::single(BytesExport::new("disk", vec![7; 4096]));
//! let gateway = Gateway::new(sockets, config, policy, exports)?;
//! println!("listening on {:?}", gateway.addresses()?);
//!
//! let shutdown = CancellationToken::new();
//! let serving = tokio::spawn(gateway.run(shutdown.clone()));
//! shutdown.cancel();
//! serving.await??;
//! # Ok(())
//! # }
//! ```
//!
//! # The path of a connection
//!
//! 1. `accept` accepts it on a [`Listener`](listen::Listener), and spawns its task once it has been
//!    admitted. [`Gateway::run`] starts an accept loop for each listener.
//! 2. `admission` checks its address against the rules ([`access`]), the connection rate and the
//!    limits, and grants a handshake permit. Behind a load balancer, the address is read from
//!    the PROXY header ([`proxy`]). A connection that is refused is closed before a byte is sent.
//! 3. `session` runs the next phases under a deadline: greeting, TLS handshake ([`tls`]),
//!    authorization of the authenticated client, and negotiation. TLS handshakes and negotiation
//!    run on low-priority threads. Each export that the client asks for is checked against the
//!    rules that are active at that time (`session::audited_exports`).
//! 4. With a session permit, [`transmit`](nbd_server::transmit) serves the chosen export, within
//!    the client's rate limits, until the client leaves, is idle for too long, is dismissed, or the
//!    gateway shuts down.
//!
//! `registry` lists all open connections, so that a new [`Policy`] can be applied to them. Each
//! event is reported once to `observer`, which feeds counters, audit ([`audit`]) and log.
//!
//! # While it runs
//!
//! [`Gateway::control`] returns a [`Control`] handle. It replaces the policy or the exports, and
//! returns status reports ([`GatewayReport`]) and counters by reason ([`REFUSALS`], [`FAILURES`]).
//! An audit [`Sink`](audit::Sink) receives all events. Log lines are written with `tracing`; those
//! that peers can cause at will are rate-limited.
//!
//! # Security
//!
//! - [`Config::check`](config::Config::check) refuses settings that serve other machines without
//!   TLS, unless that is explicitly waived; a connection that gets here some other way is refused.
//! - With TLS, nothing but STARTTLS and ABORT is answered in plaintext.
//! - Everything that a client can take is limited ([`Limits`](config::Limits)), and every wait has
//!   a deadline ([`Timeouts`](config::Timeouts)).
//!
//! # Cancellation
//!
//! Cancel the token passed to [`Gateway::run`] for a graceful shutdown: accepted requests are
//! answered within the shutdown timeout. Dropping the future stops accepting, but open
//! connections continue in their own tasks.

#![deny(missing_docs, clippy::missing_errors_doc)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;

mod accept;
pub mod access;
mod admission;
pub mod audit;
mod client_expiry;
pub mod config;
mod control;
mod gateway;
pub mod listen;
mod observer;
mod outcome;
mod policy;
pub mod proxy;
mod registry;
mod reloads;
mod report;
mod route;
mod session;
mod stats;
pub mod tls;
pub mod zone;

pub use control::Control;
pub use gateway::{AcceptLoopFailed, Gateway};
pub use nbd_telemetry::Counts;
pub use policy::Policy;
pub use report::{
    ActivityTotals, ClientCertificatesReport, ConnectionCounts, ConnectionReport,
    DurationHistogram, ExpiringClient, ExportReport, FAILURES, GatewayReport, LabelCounts,
    MAX_EXPIRING, MAX_LISTED, REFUSALS, ReloadsReport, TlsReport, label_counts, unix_seconds,
};
pub use tokio_util::sync::CancellationToken;
