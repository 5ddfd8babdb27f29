//! Tests of the reader over archives that are written for them, and over those that the Hexz tools
//! wrote.

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

#[path = "../../../tests/integration/archive_writer.rs"]
#[allow(dead_code, reason = "other tests need more of it")]
mod archive_writer;
mod block_read;
mod blocks;
mod chain;
mod damaged_parents;
mod huge;
mod limits;
mod real;
mod references;
mod signatures;
mod support;
mod uncovered;
mod unstated_size;
mod verification;
mod work;
