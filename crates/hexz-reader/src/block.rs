//! Blocks of a stream, and their hashes.

use std::fmt;

use nbd_telemetry::Hex;

use super::index_page::{Content, LocatedBlock};

/// One of the two byte streams of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// Disk image.
    Main,
    /// Data that accompanies the disk, such as a virtual machine's memory.
    Auxiliary,
}

impl StreamKind {
    /// Both streams, in the order of the master index.
    pub(crate) const ALL: [Self; 2] = [Self::Main, Self::Auxiliary];
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "main",
            Self::Auxiliary => "auxiliary",
        })
    }
}

/// BLAKE3-256 hash of a block, or 32 zero bytes if the packer recorded none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// Placeholder for a missing hash.
    pub(crate) const NONE: Self = Self([0; 32]);

    /// Returns true if the packer recorded a hash.
    pub fn is_present(&self) -> bool {
        *self != Self::NONE
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Block of a stream, or a part of one: its range of the stream and the location of its bytes.
///
/// It is a part if a reference by offset covers only some of an ancestor's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub(crate) stream: StreamKind,
    /// Index in the chain of the archive that has the entry.
    pub(crate) archive: usize,
    /// Whole block, as recorded in that archive.
    pub(crate) located: LocatedBlock,
    start: u64,
    length: u32,
    /// True if the block is a reference that may be by offset or by hash, so its hash isn't known
    /// to match its bytes.
    pub(crate) is_ambiguous: bool,
}

impl Block {
    pub(crate) fn whole(archive: usize, stream: StreamKind, located: LocatedBlock) -> Self {
        let LocatedBlock { start, length, .. } = located;
        Self { stream, archive, located, start, length, is_ambiguous: false }
    }

    /// Returns the part of another block of the stream that lies within this one.
    pub(crate) fn intersect(&self, archive: usize, located: LocatedBlock) -> Self {
        let start = self.start.max(located.start);
        let end = self.end().min(located.end());
        // Not longer than a block, whose length fits 32 bits.
        let length = u32::try_from(end.saturating_sub(start)).unwrap_or_default();
        Self { archive, located, start, length, ..*self }
    }

    /// Returns the start offset in the stream, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Returns the length in the stream, in bytes; never zero.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Returns the end offset in the stream, in bytes.
    pub fn end(&self) -> u64 {
        self.start() + u64::from(self.length())
    }

    /// Returns the number of bytes of the whole block that precede this part.
    pub fn offset_in_decoded(&self) -> u32 {
        u32::try_from(self.start - self.located.start).unwrap_or_default()
    }

    /// Returns the length of the whole block, in bytes: the length that
    /// [`Snapshot::read_block`](crate::Snapshot::read_block) returns.
    pub fn decoded_length(&self) -> u32 {
        self.located.length
    }

    /// Returns the start offset of the whole block in the stream, in bytes.
    pub fn decoded_start(&self) -> u64 {
        self.located.start
    }

    /// Returns the index in the chain of the archive that has the block; 0 is the snapshot's own.
    pub fn chain_index(&self) -> usize {
        self.archive
    }

    /// Returns true if the block is known to be all zeros without reading it.
    pub fn is_zeros(&self) -> bool {
        self.located.entry.content == Content::Zeros
    }

    /// Returns the hash of the whole block, if the packer recorded one. Equal hashes mean equal
    /// bytes, in any archive.
    pub fn hash(&self) -> Option<BlockHash> {
        let hash = self.located.entry.hash;
        (hash.is_present() && !self.is_ambiguous).then_some(hash)
    }

    /// Estimates the work to read and decode the block, in nanoseconds: one for each stored byte,
    /// and one for each decoded byte. The stored length of a block in a parent is unknown. An
    /// ambiguous block is also read, hashed and looked up.
    pub fn estimated_cost(&self) -> u64 {
        let decoded = u64::from(self.decoded_length());
        match self.located.entry.content {
            Content::Stored { place, .. } => decoded + u64::from(place.length),
            Content::InParent if self.is_ambiguous => 4 * decoded,
            Content::InParent | Content::Contradiction => 2 * decoded,
            Content::Zeros => 0,
        }
    }

    /// Returns the file offset of the stored block, in bytes, if it is stored in the snapshot's own
    /// archive.
    pub fn stored_offset(&self) -> Option<u64> {
        match self.located.entry.content {
            Content::Stored { place, .. } if self.archive == 0 => Some(place.offset),
            _ => None,
        }
    }
}
