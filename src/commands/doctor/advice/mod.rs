//! Turns observations into steps of the report, with advice on what to change.
//!
//! The functions are pure: they take data, return data, and do no I/O. The advice applies to any
//! NBD server. Where it names options, it says which program they belong to.

mod clear;
mod exports;
mod tls;
mod trust;
mod way;

#[cfg(test)]
mod tests;

pub(crate) use clear::{InClear, in_clear};
pub(crate) use exports::{contexts, export, listed, replies, unlisted, unopened, unread};
pub(crate) use tls::{
    Handshake, after_handshake, client_certificate, handshake, no_second_connection, older_tls,
};
pub(crate) use trust::{
    days, distrust, expired, name_too, not_yet_valid, unsupported, unverified, wrong_name,
};
pub(crate) use way::{connected, greeting, unconnected, unresolved};

pub(crate) use super::report::Side::{Client, Network, Server};

/// Joins the first few names, followed by an ellipsis if there are more.
fn few(names: &[String]) -> String {
    const FEW: usize = 5;
    let first: Vec<&str> = names.iter().take(FEW).map(String::as_str).collect();
    let more = if names.len() > FEW { ", …" } else { "" };
    if first.is_empty() { "none".to_owned() } else { first.join(", ") + more }
}
