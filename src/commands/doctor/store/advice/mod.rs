//! Turns observations of a store into steps of the report, with advice on what to change.
//!
//! The functions are pure. This machine is the client, the store is the server.

mod archive;
mod connection;
mod credentials;
mod object;
mod requests;
mod speed;

use crate::commands::doctor::report::Side::{Client, Network, Server};
pub(crate) use archive::{header, no_tree, not_an_archive, parents, wrong_tree};
pub(crate) use connection::{handshake_failed, handshake_timed_out, tunnel_failed, unconnected};
pub(crate) use credentials::{clock, credentials, credentials_failed, no_credentials};
pub(crate) use object::{
    CONDITIONS, RANGES, conditions, conditions_failed, encoding, identity, no_suffix,
    not_revalidated, range_failed, readable, revalidated, unreadable, unstable_identity,
};
pub(crate) use requests::{failed, list_failed, listed};
pub(crate) use speed::{latency, rate};
