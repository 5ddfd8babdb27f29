//! Stores against scripted servers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod cloud;
mod connections;
mod credentials;
mod plain;
mod server;
