//! From what was seen to what it means and what to change. Pure: nothing here connects, and
//! everything is data. The words fit any NBD server; where options are named, it is said whose.

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

/// The first of some names.
fn few(names: &[String]) -> String {
    const FEW: usize = 5;
    let first: Vec<&str> = names.iter().take(FEW).map(String::as_str).collect();
    let more = if names.len() > FEW { ", …" } else { "" };
    if first.is_empty() { "none".to_owned() } else { first.join(", ") + more }
}
