//! The sums of an archive's index, straight from its bytes as the format has them.

use std::collections::HashMap;

#[derive(Debug, Default)]
pub(super) struct Counted {
    pub(super) streams: [CountedStream; 2],
    pub(super) stored_blocks: u64,
    pub(super) unshared: u64,
    pub(super) copies: u64,
    pub(super) copy_bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct CountedStream {
    pub(super) size: u64,
    pub(super) pages: u64,
    /// Of all blocks, in ascending order.
    pub(super) lengths: Vec<u32>,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn small(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(super) fn count(bytes: &[u8]) -> Counted {
    let mut counted = Counted::default();
    let mut copies = HashMap::new();
    let mut at = number(bytes, 12) as usize;
    for stream in &mut counted.streams {
        stream.pages = number(bytes, at);
        at += 8;
        for _ in 0..stream.pages {
            let page = number(bytes, at) as usize;
            at += 28;
            for block in 0..number(bytes, page) as usize {
                let entry = page + 8 + block * 52;
                let (offset, length) = (number(bytes, entry), small(bytes, entry + 8));
                stream.lengths.push(small(bytes, entry + 12));
                if offset != u64::MAX && length != 0 {
                    counted.stored_blocks += 1;
                    counted.unshared += u64::from(length);
                    copies.insert(offset, u64::from(length));
                }
            }
        }
        stream.lengths.sort_unstable();
    }
    for stream in &mut counted.streams {
        stream.size = number(bytes, at);
        at += 8;
    }
    counted.copies = copies.len() as u64;
    counted.copy_bytes = copies.values().sum();
    counted
}
