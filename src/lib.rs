//! A read-only NBD gateway for [Hexz](https://crates.io/crates/hexz-core) snapshots, and its
//! components as a library.
//!
//! # Architecture, along the path of a request
//!
//! 1. [`gateway::listen`] accepts a connection, on a socket that it bound or that a service
//!    manager passed ([`gateway::handed`]). With [`gateway::stdio`], the process inherits a
//!    connection.
//! 2. [`gateway::access`] checks the address of the peer, or the one that a load balancer reports
//!    ([`gateway::proxy`]). A connection that isn't admitted is closed before a byte is sent.
//! 3. [`gateway`] assigns it a handshake permit and a deadline.
//! 4. [`nbd::greet`] and [`nbd::plaintext_leg`] send the greeting, and handle STARTTLS if TLS is
//!    required. [`gateway::tls`] performs the TLS handshake and authenticates the client. State
//!    from the plaintext phase is discarded.
//! 5. [`nbd::negotiate`], on the handshake threads, lets the client choose one of the exports
//!    ([`exports`]) that the rules let it open, and metadata contexts. The client is authorized
//!    again whenever rules or certificates are reloaded ([`gateway::Control`]) or have expired.
//! 6. [`nbd::transmit`] validates requests, processes them concurrently, and sends the replies.
//! 7. [`exports`] and [`cache`] look up decoded blocks. On a miss, the block is decoded once,
//!    however many clients ask for it, by a decoder thread. Decoding is scheduled fairly: the
//!    client that has used the least time is next.
//! 8. [`snapshot`] looks up the block's index entry, and checks, decrypts, decompresses and
//!    verifies its stored bytes, in this archive or in a parent.
//! 9. [`storage`] reads the stored bytes.
//!
//! All steps maintain counters, which [`monitor`] exposes.
//!
//! # Module boundaries
//!
//! [`nbd::wire`] does no I/O. [`nbd`] is independent of sockets, TLS and snapshots, and serves
//! any implementation of [`nbd::Export`]. [`snapshot`] is independent of NBD, [`cache`] of the
//! meaning of blocks, and [`storage`] of compression. [`sandbox`] is independent of all of these,
//! and they of it. Events are reported to [`audit`], which is independent of them too. The
//! library never parses a command line or ends the process.
//!
//! # Using the components
//!
//! To serve your own bytes with the engine, see `examples/serve_bytes.rs`. To read blocks from a
//! snapshot, see `examples/read_blocks.rs`, or in short:
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
