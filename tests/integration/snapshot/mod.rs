//! Tests of the snapshot reader together with its exports, and with checking. Those of the reader
//! alone are in its package.

pub(crate) mod damage;
pub(crate) mod property;
#[path = "../../../crates/hexz-reader/tests/support.rs"]
#[allow(dead_code, reason = "the reader's own tests need more of it")]
mod support;

pub(crate) use support::{STREAMS, open, open_bytes, read, read_whole, with_password};
