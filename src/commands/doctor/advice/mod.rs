//! Turns observations into steps of the report, with advice on what to change.
//!
//! The functions are pure: they take data, return data, and do no I/O. The advice applies to any
//! NBD server. Where it names options, it says which program they belong to.

mod connection;
mod exports;
mod plaintext;
mod tls;
mod trust;

#[cfg(test)]
mod tests;

pub(crate) use connection::{connected, greeting, unconnected, unresolved};
pub(crate) use exports::{
    contexts, export, list_failed, listed, open_failed, read_failed, replies,
};
pub(crate) use plaintext::{PlaintextProbe, plaintext};
pub(crate) use tls::{
    ClientAuthState, client_certificate, client_certificate_expiry, handshake_failed,
    no_second_connection, older_tls, rejected_after_handshake,
};
pub(crate) use trust::{
    also_wrong_name, expired, format_validity, not_yet_valid, unsupported, untrusted, unverified,
    wrong_name,
};

pub(crate) use super::report::Side::{Client, Network, Server};

/// Number of names in a piece of advice.
const FEW: usize = 5;
