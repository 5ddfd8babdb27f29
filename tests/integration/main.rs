//! Tests of the whole, over real files and real sockets.
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

mod admission;
#[allow(dead_code, reason = "tests of the packages need more of it")]
mod archive_writer;
mod audit;
mod changed;
mod clients;
mod configuration;
mod costs;
mod doctor;
mod documents;
mod exports;
mod gateway;
mod inspect;
mod manual;
mod monitor;
mod pki;
mod protocol;
mod random;
#[cfg(feature = "remote")]
mod remote;
mod security_cases;
mod service;
mod snapshot;
mod support;
mod verify;
mod versions;
