//! A read-only NBD server over any byte stream.
//!
//! The engine serves any implementation of [`Export`] over any `AsyncRead + AsyncWrite`. It is
//! independent of sockets and TLS, logs nothing, and has no global state. It needs a Tokio runtime
//! with time enabled.
//!
//! # Quick start
//!
//! [`handle_client`] serves one client from the greeting until it leaves. [`BytesExport`] and
//! [`FileExport`] are ready-made exports, and [`ExportSet`] gives them to clients by name:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nbd_server::{BytesExport, ExportSet, handle_client};
//!
//! let exports = ExportSet::single(BytesExport::new("disk", vec![7; 4096]));
//! // In a server, this is an accepted connection.
//! let (client, stream) = tokio::io::duplex(1024);
//! let session = tokio::spawn(async move { handle_client(stream, &exports).await });
//! # drop(client);
//! # session.await?.ok();
//! # Ok(())
//! # }
//! ```
//!
//! [`handle_client_with`] takes explicit limits, a memory budget that several clients share, and a
//! future that starts a graceful shutdown.
//!
//! # A session, step by step
//!
//! A front end that adds TLS, access rules or auditing calls the steps itself, in this order
//! (in `serve.rs`, [`handle_client_with`] does the same without TLS):
//!
//! 1. [`greet`] (`greeting.rs`) sends the greeting and reads the client's flags.
//! 2. [`plaintext_leg`] (`negotiate/mod.rs`), if TLS is required, waits for the client to start TLS.
//!    It refuses all other options, and reads no byte beyond STARTTLS. The front end then runs the TLS
//!    handshake and continues on the encrypted stream. The greeting is not repeated.
//! 3. [`negotiate()`] answers options until the client chooses an export. [`Exports`], one client's
//!    view of the exports, finds and lists them.
//! 4. [`transmit()`] (`transmit/connection.rs`) serves the [`Negotiated`] export until the client leaves or the server shuts
//!    down, and returns [`SessionStats`].
//!
//! ```
//! # async fn example<S, X>(
//! #     mut stream: S,
//! #     exports: &X,
//! # ) -> Result<(), nbd_server::SessionError>
//! # where
//! #     S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
//! #     X: nbd_server::Exports,
//! # {
//! use nbd_server::budget::Budget;
//! use nbd_server::{NegotiationLimits, Security, TransmitLimits, greet, negotiate, transmit};
//!
//! let budget = Budget::new(64 << 20, 8 << 20);
//! let flags = greet(&mut stream).await?;
//! let mut quota = NegotiationLimits::default().quota();
//! let negotiated = negotiate(&mut stream, flags, Security::Plain, exports, &mut quota).await?;
//! if let Some(negotiated) = negotiated {
//!     let limits = TransmitLimits::new(budget);
//!     let stats = transmit(stream, negotiated, &limits, std::future::pending()).await?;
//!     println!("{} requests", stats.requests);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What to implement
//!
//! - [`Export`]: a name, a size, and bytes. [`Export::read`] is all that is needed;
//!   [`Export::read_now`] answers from memory without a task, [`Export::read_ahead`] and
//!   [`Export::cache`] prefetch, and [`Export::contexts`] with [`Export::extents`] reports block
//!   status.
//! - [`Exports`]: the exports that one client may choose from, by name. [`ExportSet`] is one.
//! - [`ExportCatalog`]: all exports of a server, for a front end that restricts each client to a
//!   view of them by an [`AccessFilter`].
//!
//! # Limits
//!
//! | limit | value |
//! | --- | --- |
//! | option data | 64 KiB for each option, and [`NegotiationLimits`] for each client |
//! | length of a read | 32 MiB ([`MAX_PAYLOAD`](wire::MAX_PAYLOAD)) |
//! | requests in flight | 256 for each connection, of which 8 are processed at a time |
//! | memory for replies | [`RESERVE`](budget::RESERVE) for each connection, and a pool that all share ([`Budget`](budget::Budget)) |
//! | rate | optional: bytes and requests per second ([`Throttle`]) |
//! | time | idle, stall and drain timeouts ([`TransmitLimits`]) |
//!
//! [`greet`], [`plaintext_leg`] and [`negotiate()`] have no deadlines of their own: wrap them in
//! [`tokio::time::timeout`], as [`handle_client`] does.
//!
//! # Errors and cancellation
//!
//! A [`SessionError`] concerns one session only. An export reports failures as [`ReadError`]; its
//! client is sent an I/O error, and the session continues. A panic in an export is answered with an
//! I/O error, too.
//!
//! The futures of all steps can be dropped at any time. The stream is then in an undefined state
//! and should be closed. Dropping the future of [`transmit()`] cancels all tasks that it has spawned;
//! to let it answer the requests in flight, complete its `shutdown` future instead.
//!
//! # Monitoring
//!
//! [`SessionMetrics`] can be read while a session runs; [`MetricsTotals`] adds up several sessions.
//!
//! # Feature flags
//!
//! - `client`: a scripted client (module `client`), for tests and probes.
//! - `serde`: serialization and deserialization of [`RequestCounts`].

#![deny(missing_docs, clippy::missing_errors_doc)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;

pub mod budget;
#[cfg(feature = "client")]
pub mod client;
mod count_guard;
mod error;
mod export;
mod greeting;
mod metrics;
mod negotiate;
mod ready_made;
mod serve;
mod throttle;
mod transmit;
pub mod wire;

pub use error::{ReadError, SessionError};
pub use export::{
    AccessFilter, COPY_THRESHOLD, ContextQueries, Export, ExportCatalog, ExportSummary, Exports,
    Extent, ListEntry, Segment, Span,
};
pub use greeting::greet;
pub use metrics::{
    ErrorCounts, LATENCY_BOUNDS, LatencyHistogram, MetricsTotals, RequestCounts, SessionMetrics,
};
pub use negotiate::{
    Negotiated, NegotiationLimits, NegotiationQuota, PlaintextOutcome, ReplyMode, Security,
    SelectedContext, negotiate, plaintext_leg,
};
#[cfg(unix)]
pub use ready_made::FileExport;
pub use ready_made::{BytesExport, ExportSet};
pub use serve::{SessionOptions, handle_client, handle_client_with};
pub use throttle::Throttle;
pub use transmit::{CloseReason, SessionStats, TransmitLimits, transmit};
