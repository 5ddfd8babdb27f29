//! Support for what a network service reports: escaping of untrusted text ([`escape`]), rate
//! limits for log lines that peers can cause ([`RateLimit`]), and counters by reason ([`Tally`]).

pub mod escape;
mod rate_limit;
mod tally;
mod token_bucket;

pub use rate_limit::{RateLimit, Suppressed};
pub use tally::{Counts, Tally};
pub use token_bucket::{TokenBucket, TokenRate};
