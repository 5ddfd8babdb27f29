//! Limits on the resources that an archive may request. Each length from a file is checked against
//! its limit before memory is allocated for it.

/// Maximum length of a block in the stream, in bytes. The Hexz tools create chunks of at most 16
/// MiB.
pub const MAX_BLOCK: u32 = 32 * 1024 * 1024;

/// Returns the maximum stored length of a block of `length` bytes: the worst-case overhead of LZ4,
/// Zstandard and encryption for incompressible data. Reading a block must not take work out of
/// proportion to its length.
pub const fn max_stored(length: u32) -> u32 {
    length.saturating_add(length / 128).saturating_add(1024)
}

/// Maximum length of a stored block, in bytes.
pub const MAX_STORED_BLOCK: u32 = max_stored(MAX_BLOCK);

/// Maximum number of blocks on an index page, fixed by the format.
pub(crate) const MAX_PAGE_BLOCKS: u64 = 4096;

/// Maximum length of a master index, in bytes: pages for more than 9 billion blocks.
pub const MAX_MASTER_INDEX: u64 = 64 * 1024 * 1024;

/// Maximum length of a Zstandard dictionary, in bytes. The Hexz tools create 110 KiB.
pub const MAX_DICTIONARY: u32 = 8 * 1024 * 1024;

/// Maximum number of archives in a backing chain, including the served archive.
pub const MAX_CHAIN: usize = 256;

/// Maximum number of stored blocks in the index of the parents' hashes, of all parents together (8
/// bytes each).
pub(crate) const MAX_PARENT_BLOCKS: usize = 1 << 27;

/// Maximum size of a stream, in bytes: protocols and clients use signed 64-bit offsets.
pub const MAX_STREAM: u64 = i64::MAX as u64;

/// Upper bound for the configurable limit of PBKDF2 iterations: a few seconds of work.
pub const MAX_KDF_ITERATIONS: u32 = 10_000_000;

/// Default limit of PBKDF2 iterations. The Hexz tools use 600,000.
pub const DEFAULT_KDF_ITERATIONS: u32 = 1_000_000;

/// Default memory for index pages, in bytes: enough for the pages of some 20 GiB.
pub const DEFAULT_INDEX_BUDGET: u64 = 16 * 1024 * 1024;

/// Maximum number of bytes that are decoded while opening an archive to learn the size of a stream
/// that its master index doesn't state: an index page of 256 KiB blocks.
pub const MAX_PROBED_BYTES: u64 = 1 << 30;

/// Maximum memory for the hash trees of archives with a digest, in bytes: 32 for each 256 KiB of
/// archive, so enough for 8 TiB.
pub(crate) const MAX_TREE_MEMORY: u64 = 1 << 30;

/// Memory for recently verified parts of archives with a digest, in bytes: 32 groups, each of which
/// serves further reads of the same group.
pub(crate) const GROUP_CACHE_BYTES: u64 = 8 * 1024 * 1024;
