//! Keys under which decoded blocks are cached.

use std::hash::{Hash, Hasher};

use hexz_reader::{Block, BlockHash, Snapshot, StreamKind};

/// Cache key of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlockKey {
    /// Verified hash: equal hashes mean equal bytes, in whatever archive they are.
    Content(BlockHash),
    /// Location, for a block without a verified hash; such a block only equals itself.
    Location { snapshot: u64, archive: usize, stream: StreamKind, start: u64 },
}

impl BlockKey {
    /// Returns the key under which a block is cached.
    pub(super) fn of(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        match block.hash() {
            // An unverified block must not be served for another archive's block.
            Some(hash) if snapshot.verifies_hashes() => Self::Content(hash),
            _ => Self::location(block, snapshot, stream),
        }
    }

    /// Returns the key under which a block is decoded. Until its bytes have been verified, a
    /// block only equals itself, so no client waits for another archive's block.
    pub(super) fn location(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        Self::Location {
            snapshot: snapshot.id(),
            archive: block.chain_index(),
            stream,
            start: block.decoded_start(),
        }
    }
}

impl Hash for BlockKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            // Any eight bytes of a cryptographic hash are uniformly distributed.
            Self::Content(BlockHash([a, b, c, d, e, f, g, h, ..])) => {
                state.write_u64(u64::from_ne_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
            }
            Self::Location { snapshot, archive, stream, start } => {
                (snapshot, archive, stream, start).hash(state);
            }
        }
    }
}
