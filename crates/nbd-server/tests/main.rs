//! Tests of the engine over in-process streams.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::let_underscore_must_use,
    missing_docs,
    unreachable_pub,
    reason = "a test that can't go on shall panic"
)]

mod draining;
mod flood;
mod handle_client;
mod negotiation;
mod quota;
mod rates;
mod raw;
mod reads;
