//! A read-only NBD server over any byte stream.
//!
//! A session runs through [`greet`], [`plaintext_leg`] if TLS is required, [`negotiate`] and
//! [`transmit`], in this order. The engine is independent of sockets, TLS and snapshots: it serves
//! any implementation of [`Export`] over any `AsyncRead + AsyncWrite`.

mod activity;
pub mod budget;
#[cfg(feature = "client")]
pub mod client;
mod counted;
mod error;
mod export;
mod greeting;
mod negotiate;
mod throttle;
mod transmit;
pub mod wire;

pub use activity::{Activity, Done, Errors, LATENCY_BOUNDS, Latencies, Requests};
pub use error::{ReadError, SessionError};
pub use export::{
    COPIED, ContextQueries, Export, Exports, Extent, Listing, MayOpen, Offer, Offered, Segment,
    Span,
};
pub use greeting::greet;
pub use negotiate::{
    Allowance, Chosen, NegotiationLimits, PlaintextOutcome, ReplyMode, Security, SelectedContext,
    negotiate, plaintext_leg,
};
pub use throttle::Throttle;
pub use transmit::{Farewell, Summary, TransmitLimits, transmit};
