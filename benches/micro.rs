//! Parts of the way of a byte, each alone: `make bench-micro`.
//!
//! They say which part became slower or faster, where `make bench` says whether it matters.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub,
    reason = "a benchmark that can't go on shall panic"
)]

mod support;

use bytes::Bytes;
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use hexz_exports::cache::ByteCache;
use hexz_reader::StreamKind;
use nbd_server::wire::reply::{ChunkHeader, ErrorCode, ReplyFlags, ReplyType, SimpleReply};
use nbd_server::wire::request::{Command, CommandFlags, Cookie, Request};

use support::{Scripted, blocks, cached_export, requests, runtime, serve, snapshot};

fn main() {
    divan::main();
}

mod wire {
    use super::*;

    #[divan::bench]
    fn decode_request(bencher: Bencher<'_, '_>) {
        let request = Request {
            flags: CommandFlags::default(),
            command: Command::READ,
            cookie: Cookie(7),
            offset: 1 << 40,
            length: 4096,
        };
        let bytes = request.encode();
        bencher.bench(|| Request::decode(black_box(&bytes)).unwrap());
    }

    #[divan::bench]
    fn encode_simple_reply(bencher: Bencher<'_, '_>) {
        let reply = SimpleReply { error: ErrorCode::OK, cookie: Cookie(7) };
        bencher.bench(|| black_box(reply).encode());
    }

    #[divan::bench]
    fn encode_chunk_header(bencher: Bencher<'_, '_>) {
        let header = ChunkHeader {
            flags: ReplyFlags::DONE,
            kind: ReplyType::OFFSET_DATA,
            cookie: Cookie(7),
            length: 4104,
        };
        bencher.bench(|| black_box(header).encode());
    }
}

/// A block is found on an index page that is in memory, of an archive with many blocks.
#[divan::bench]
fn index_lookup(bencher: Bencher<'_, '_>) {
    let snapshot = snapshot("fixed-4k-zstd.hxz");
    let size = snapshot.size(StreamKind::Main);
    snapshot.locate(StreamKind::Main, 0).unwrap();
    let mut at = 0;
    bencher.bench_local(|| {
        at = (at + 12_345_678_901) % size;
        snapshot.try_locate(StreamKind::Main, black_box(at)).unwrap().unwrap()
    });
}

/// All blocks of an archive are read, checked, decrypted, decoded and verified.
#[divan::bench(args = [
    "base-lz4.hxz",
    "base-zstd.hxz",
    "text-dict-zstd.hxz",
    "encrypted-lz4.hxz",
    "encrypted-zstd.hxz",
    "child-zstd.hxz",
])]
fn block_pipeline(bencher: Bencher<'_, '_>, archive: &str) {
    let snapshot = snapshot(archive);
    let blocks = blocks(&snapshot);
    let bytes: u64 = blocks.iter().map(|block| u64::from(block.length())).sum();
    bencher.counter(BytesCount::new(bytes)).bench(|| {
        blocks.iter().map(|block| snapshot.read_block(block).unwrap().len()).sum::<usize>()
    });
}

mod cache {
    use super::*;

    const BLOCK: usize = 64 * 1024;
    const BLOCKS: u64 = 1024;

    /// Twice as much is asked for as there is room for, or half as much.
    fn cache(room: u64) -> ByteCache<[u8; 32]> {
        ByteCache::new(room * (BLOCK as u64 + 128), BLOCK as u64)
    }

    /// As a block's hash is spread.
    fn key(number: u64) -> [u8; 32] {
        let mut key = [0; 32];
        for part in key.chunks_exact_mut(8) {
            part.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
        key
    }

    #[divan::bench]
    fn hit(bencher: Bencher<'_, '_>) {
        let (runtime, cache) = (runtime(), cache(2 * BLOCKS));
        let block = Bytes::from(vec![1; BLOCK]);
        for number in 0..BLOCKS {
            let make = async { Ok::<_, ()>(block.clone()) };
            runtime.block_on(cache.get_or_insert_with(&key(number), &key(number), make)).unwrap();
        }
        let mut number = 0;
        bencher.bench_local(|| {
            number = (number + 7919) % BLOCKS;
            cache.get(black_box(&key(number))).unwrap()
        });
    }

    /// What is inserted pushes something else out.
    #[divan::bench]
    fn miss_and_insert(bencher: Bencher<'_, '_>) {
        let (runtime, cache) = (runtime(), cache(BLOCKS));
        let block = Bytes::from(vec![1; BLOCK]);
        let mut number = 0;
        bencher.bench_local(|| {
            number += 1;
            let make = async { Ok::<_, ()>(block.clone()) };
            runtime
                .block_on(cache.get_or_insert_with(black_box(&key(number)), &key(number), make))
                .unwrap()
        });
    }
}

/// From requests that have arrived to replies that have been written, 32 at a time, all of
/// it from the cache; nobody reads what is written.
mod transmission {
    use super::*;

    /// Enough that beginning and ending don't matter.
    const READS: u64 = 1024;

    #[divan::bench(args = [4096, 262_144])]
    fn plain(bencher: Bencher<'_, '_>, length: u32) {
        let runtime = runtime();
        let export = cached_export(&runtime);
        let requests = requests(READS, length);
        bencher
            .counter(ItemsCount::new(READS))
            .counter(BytesCount::new(READS * u64::from(length)))
            .with_inputs(|| Scripted::new(requests.clone()))
            .bench_local_values(|connection| serve(&runtime, &export, connection));
    }

    #[divan::bench(args = [4096, 262_144])]
    fn tls(bencher: Bencher<'_, '_>, length: u32) {
        let runtime = runtime();
        let export = cached_export(&runtime);
        let requests = requests(READS, length);
        bencher
            .counter(ItemsCount::new(READS))
            .counter(BytesCount::new(READS * u64::from(length)))
            .with_inputs(|| Scripted::over_tls(&requests))
            .bench_local_values(|connection| serve(&runtime, &export, connection));
    }
}
