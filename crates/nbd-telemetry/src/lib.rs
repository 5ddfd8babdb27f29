//! Support for what a network service reports: escaping of untrusted text ([`escape`]), rate
//! limits for log lines that peers can cause ([`RateLimit`]), counters by reason ([`Tally`]), and
//! hexadecimal digits ([`Hex`]).
//! Threads that must not delay others lower their priority with [`lower_thread_priority`].
//!
//! Nothing is global.
//!
//! ```
//! use std::time::Duration;
//!
//! use nbd_telemetry::{RateLimit, escape};
//!
//! // A hundred lines at once, then ten per second.
//! let limit = RateLimit::new(100, Duration::from_millis(100));
//! if limit.allow().is_some() {
//!     println!("no such file: {}", escape::name("a\nb"));
//! }
//! ```

#![deny(missing_docs, clippy::missing_errors_doc)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;

pub mod escape;
mod hex;
mod priority;
mod rate_limit;
mod tally;
mod token_bucket;

pub use hex::Hex;
pub use priority::lower_thread_priority;
pub use rate_limit::{RateLimit, Suppressed};
pub use tally::{Counts, Tally};
pub use token_bucket::{TokenBucket, TokenRate};
