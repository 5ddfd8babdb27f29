//! A read-only NBD server over any byte stream.
//!
//! A session runs through [`greet`], [`plaintext_leg`] if TLS is required, [`negotiate`] and
//! [`transmit`], in this order. The engine is independent of sockets, TLS and snapshots: it serves
//! any implementation of [`Export`] over any `AsyncRead + AsyncWrite`.

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
