//! Remarks about archives that are valid but unusual.

use std::fmt;

use super::StreamKind;

/// Property of an archive that is valid but may surprise its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remark {
    /// The master index states 0 bytes but lists blocks.
    UnstatedSize {
        /// Affected stream.
        stream: StreamKind,
        /// Sum of the blocks' lengths, in bytes, which is served as the size.
        size: u64,
    },
    /// The blocks end before the stated length.
    EndsEarly {
        /// Affected stream.
        stream: StreamKind,
        /// End offset of the blocks, in bytes.
        end: u64,
        /// Stated length, in bytes.
        size: u64,
        /// True if the uncovered bytes read as zeros, false if reading them is an error.
        reads_zeros: bool,
    },
}

impl Remark {
    /// Returns a stable label for logs and programs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::UnstatedSize { .. } => "unstated_size",
            Self::EndsEarly { .. } => "ends_early",
        }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnstatedSize { stream, size } => write!(
                f,
                "the index states 0 bytes for the {stream} stream, as when a pipe or a block \
                 device is packed; its size is taken from its blocks: {size} bytes"
            ),
            Self::EndsEarly { stream, end, size, reads_zeros } => {
                let then = if *reads_zeros { "read as zeros" } else { "can't be read" };
                write!(
                    f,
                    "the blocks end before the stated length, as \"hexz convert tar\" writes it: \
                     bytes {end} to {size} of the {stream} stream {then}"
                )
            }
        }
    }
}
