//! Tests of exports over archives that are written for them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub,
    reason = "a test that can't go on shall panic"
)]

#[path = "../../../tests/integration/archive_writer.rs"]
#[allow(dead_code, reason = "other tests need more of it")]
mod archive_writer;
mod decoding;
mod reader;
mod remote;
mod small_blocks;
mod support;
