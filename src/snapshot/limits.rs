//! What an archive may ask of this machine. Each number meets a length from the file
//! before memory is allocated for it.

/// The largest block, in bytes of the stream. The real tools make chunks of at most
/// 16 MiB.
pub const MAX_BLOCK: u32 = 32 * 1024 * 1024;

/// The largest stored form of a block of `length` bytes: what LZ4, Zstandard and encryption
/// may at worst add to an incompressible block. Reading a block must not take work that is
/// out of proportion to it.
pub const fn max_stored(length: u32) -> u32 {
    length.saturating_add(length / 128).saturating_add(1024)
}

/// The largest stored block, in bytes.
pub const MAX_STORED_BLOCK: u32 = max_stored(MAX_BLOCK);

/// Blocks on one index page, as the format has it.
pub const MAX_PAGE_BLOCKS: u64 = 4096;

/// The largest master index, in bytes: pages for some 9,000 million blocks.
pub const MAX_MASTER_INDEX: u64 = 64 * 1024 * 1024;

/// The largest Zstandard dictionary, in bytes. The real tools make 110 KiB.
pub const MAX_DICTIONARY: u32 = 8 * 1024 * 1024;

/// Archives in one chain of parents, the served one included.
pub const MAX_CHAIN: usize = 256;

/// Stored blocks of all parents together, for the index of their hashes (8 bytes each).
pub const MAX_PARENT_BLOCKS: usize = 1 << 27;

/// The largest stream, in bytes: protocols and clients count in signed 64 bits.
pub const MAX_STREAM: u64 = i64::MAX as u64;

/// PBKDF2 iterations that can be allowed: a few seconds of work.
pub const MAX_KDF_ITERATIONS: u32 = 10_000_000;

/// PBKDF2 iterations that are allowed by default. The real tools use 600,000.
pub const DEFAULT_KDF_ITERATIONS: u32 = 1_000_000;

/// Memory for index pages, in bytes, unless told otherwise: those of some 20 GiB.
pub const DEFAULT_INDEX_BUDGET: u64 = 16 * 1024 * 1024;

/// Bytes that are decoded when an archive is opened, to learn the size of a stream that its
/// master index doesn't state: an index page of blocks of 256 KiB.
pub const MAX_PROBED: u64 = 1 << 30;

/// Memory for the hash trees of archives that have a digest, in bytes: 32 for each 256 KiB of
/// them, so trees of 8 TiB.
pub const MAX_TREES: u64 = 1 << 30;

/// Memory for parts of archives that were verified by their digest lately, in bytes: 32 groups,
/// of which each serves the reads of its neighbourhood.
pub const MAX_RECENT_GROUPS: u64 = 8 * 1024 * 1024;
