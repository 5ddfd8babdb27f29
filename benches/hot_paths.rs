//! The hot paths, as often as it is told, for whoever counts the instructions that they
//! take: `benches/count-instructions.sh`.
//!
//! Unlike seconds, instructions are the same whatever else the machine does.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub,
    reason = "a benchmark that can't go on shall panic"
)]

mod support;

use std::hint::black_box;
use std::sync::Arc;

use hexz_exports::SnapshotExport;
use hexz_reader::{Block, Snapshot};
use tokio::runtime::Runtime;
use tokio_rustls::server::TlsStream;

use support::{Scripted, blocks, cached_export, requests, runtime, serve, snapshot};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["warm_reads", count] => {
            let runtime = runtime();
            let export = cached_export(&runtime);
            let requests = requests(count.parse().unwrap(), 4096);
            warm_reads(&runtime, &export, Scripted::new(requests));
        }
        ["warm_reads_tls", count] => {
            let runtime = runtime();
            let export = cached_export(&runtime);
            let requests = requests(count.parse().unwrap(), 4096);
            warm_reads_tls(&runtime, &export, Scripted::over_tls(&requests));
        }
        ["cold_blocks", count] => {
            let snapshot = snapshot("fixed-64k-zstd.hxz");
            cold_blocks(&snapshot, &blocks(&snapshot), count.parse().unwrap());
        }
        // As `cargo bench` calls it.
        _ => eprintln!("to be run by benches/count-instructions.sh"),
    }
}

/// From requests that have arrived to replies that have been written, all of it from the
/// cache.
#[inline(never)]
fn warm_reads(runtime: &Runtime, export: &Arc<SnapshotExport>, connection: Scripted) {
    black_box(serve(runtime, export, connection));
}

/// The same with TLS: what is written is encrypted first.
#[inline(never)]
fn warm_reads_tls(
    runtime: &Runtime,
    export: &Arc<SnapshotExport>,
    connection: TlsStream<Scripted>,
) {
    black_box(serve(runtime, export, connection));
}

/// From a file to a block's verified bytes.
#[inline(never)]
fn cold_blocks(snapshot: &Snapshot, blocks: &[Block], count: usize) {
    for number in 0..count {
        black_box(snapshot.read_block(&blocks[number % blocks.len()]).unwrap());
    }
}
