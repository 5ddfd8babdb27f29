//! A read-only NBD gateway for [Hexz](https://crates.io/crates/hexz-core) snapshots, and
//! the parts that it is made of.
//!
//! # The tour, in the order in which a byte travels
//!
//! 1. [`gateway::listen`]: a connection is accepted, by a socket that was bound here or handed
//!    over ([`gateway::handed`]); or it was there before the program ([`gateway::stdio`]);
//! 2. [`gateway::access`]: its address is judged, or the one that a load balancer says
//!    ([`gateway::proxy`]); whoever may not come in is closed before a byte is sent;
//! 3. [`gateway`]: it gets a place among those that negotiate, and a deadline;
//! 4. [`nbd::greet`], [`nbd::plaintext_leg`]: the greeting, and STARTTLS if TLS is
//!    required, by [`gateway::tls`], which also says who the client is; what was said in
//!    clear leaves no trace behind it;
//! 5. [`nbd::negotiate`]: on the threads of handshakes, the client chooses among the exports
//!    ([`exports`]) that the rules let it open, and metadata contexts; whenever rules or certificates
//!    are read anew
//!    ([`gateway::Control`]), or have run out, it is judged again;
//! 6. [`nbd::transmit`]: requests are judged, worked on side by side, and answered;
//! 7. [`exports`], [`cache`]: a decoded block is found, or decoded once however many ask for
//!    it, by a thread that decodes for whoever had least so far;
//! 8. [`snapshot`]: its index entry is found, its stored bytes are checked, decrypted,
//!    decompressed and verified, in this archive or in a parent;
//! 9. [`storage`]: the stored bytes are read.
//!
//! What came of all that is counted on the way, and shown by [`monitor`].
//!
//! # Who may not know what
//!
//! [`nbd::wire`] does no I/O. [`nbd`] knows neither sockets nor TLS nor snapshots, and
//! serves whatever implements [`nbd::Export`]. [`snapshot`] doesn't know NBD, [`cache`]
//! not what a block means, [`storage`] nothing about compression. [`sandbox`] knows none of them,
//! nor they it; what happened is told to [`audit`], which doesn't know them either. Nothing here
//! parses a command line or ends the process.
//!
//! # Using the parts
//!
//! Serve your own bytes with the engine: `examples/serve_bytes.rs`. Read blocks from a
//! snapshot: `examples/read_blocks.rs`, or, in short:
//!
//! ```no_run
//! use std::path::Path;
//! use hexz_nbd::snapshot::{OpenOptions, Snapshot, StreamKind};
//!
//! let snapshot = Snapshot::open(Path::new("snap.hexz"), &OpenOptions::default())?;
//! let mut boot_sector = [0; 512];
//! snapshot.read_exact_at(StreamKind::Main, &mut boot_sector, 0)?;
//! # Ok::<(), hexz_nbd::snapshot::Error>(())
//! ```

pub mod audit;
mod background;
pub mod cache;
pub mod config;
pub mod escape;
pub mod exports;
pub mod gateway;
mod limited;
pub mod monitor;
pub mod nbd;
pub mod sandbox;
pub mod snapshot;
pub mod storage;
mod tally;
