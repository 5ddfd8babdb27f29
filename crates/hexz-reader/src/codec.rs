//! Decompression of blocks to the exact length that the index states.

use std::fmt;

use parking_lot::Mutex;
use zstd::bulk::Decompressor;

use super::error::ErrorKind;
use super::header::Compression;

/// Number of leading bytes of a stored block that contain its decoded length, if it is stated: a
/// Zstandard frame header (RFC 8878, section 3.1.1.1).
pub(super) const MAX_FRAME_HEADER_LEN: usize = 18;

/// Decompressor for the blocks of one archive.
pub(super) struct Codec {
    compression: Compression,
    dictionary: Vec<u8>,
    /// Pool of idle contexts. There are never more contexts than threads that decode.
    idle: Mutex<Vec<Decompressor<'static>>>,
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codec")
            .field("compression", &self.compression)
            .field("dictionary", &self.dictionary.len())
            .finish_non_exhaustive()
    }
}

impl Codec {
    /// Creates a decompressor; `dictionary` is empty if there is none.
    pub(super) fn new(compression: Compression, dictionary: Vec<u8>) -> Self {
        Self { compression, dictionary, idle: Mutex::default() }
    }

    /// Decompresses `stored` to exactly `length` bytes, without allocating more than that.
    pub(super) fn decode(&self, stored: &[u8], length: u32) -> Result<Vec<u8>, ErrorKind> {
        let block = match self.compression {
            Compression::Lz4 => decode_lz4(stored, length)?,
            Compression::Zstd => self.decode_zstd(stored, length)?,
        };
        if block.len() == length as usize {
            Ok(block)
        } else {
            Err(ErrorKind::LengthMismatch { got: block.len(), expected: length })
        }
    }

    /// Returns the decoded length that a block states in its first bytes, if it does.
    pub(super) fn stated_length(&self, head: &[u8]) -> Option<u32> {
        match self.compression {
            Compression::Lz4 => head.first_chunk().map(|size| u32::from_le_bytes(*size)),
            Compression::Zstd => {
                let length = zstd::zstd_safe::get_frame_content_size(head).ok().flatten()?;
                u32::try_from(length).ok()
            }
        }
    }

    fn decode_zstd(&self, stored: &[u8], length: u32) -> Result<Vec<u8>, ErrorKind> {
        let failed = |error: std::io::Error| ErrorKind::Decompress(error.to_string());
        // The decompressor would treat bytes behind the frame as further frames.
        let frame = zstd::zstd_safe::find_frame_compressed_size(stored);
        if frame.is_ok_and(|length| length != stored.len()) {
            return Err(ErrorKind::Decompress("there is something behind its frame".to_owned()));
        }
        let waiting = self.idle.lock().pop();
        let mut context = match waiting {
            Some(context) => context,
            None => Decompressor::with_dictionary(&self.dictionary).map_err(failed)?,
        };
        let mut block = Vec::with_capacity(length as usize);
        let decoded = context.decompress_to_buffer(stored, &mut block);
        self.idle.lock().push(context);
        decoded.map_err(failed)?;
        Ok(block)
    }
}

/// Decodes a 32-bit decoded size followed by a raw LZ4 block. The size is compared with `length`,
/// never used for allocation.
fn decode_lz4(stored: &[u8], length: u32) -> Result<Vec<u8>, ErrorKind> {
    let (size, raw) = stored.split_first_chunk().ok_or(ErrorKind::Truncated("a block's size"))?;
    let size = u32::from_le_bytes(*size);
    if size != length {
        return Err(ErrorKind::LengthMismatch { got: size as usize, expected: length });
    }
    let mut block = vec![0; length as usize];
    let written = lz4_flex::block::decompress_into(raw, &mut block)
        .map_err(|error| ErrorKind::Decompress(error.to_string()))?;
    block.truncate(written);
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_lengths_are_rejected() {
        let text = b"abcabcabcabcabcabcabcabcabc";
        let lz4 = lz4_flex::block::compress_prepend_size(text);
        let zstd = zstd::bulk::compress(text, 3).unwrap();
        for (compression, stored) in [(Compression::Lz4, lz4), (Compression::Zstd, zstd)] {
            let codec = Codec::new(compression, Vec::new());
            assert_eq!(codec.decode(&stored, 27).unwrap(), text);
            for wrong in [0, 1, 26, 28, 1 << 20] {
                assert!(codec.decode(&stored, wrong).is_err(), "{compression} {wrong}");
            }
            for cut in 0..stored.len() {
                assert!(codec.decode(&stored[..cut], 27).is_err(), "{compression} cut at {cut}");
            }
        }
    }

    #[test]
    fn consecutive_frames_are_rejected() {
        let frame = zstd::bulk::compress(b"abc", 3).unwrap();
        let codec = Codec::new(Compression::Zstd, Vec::new());
        let twice = [frame.clone(), frame].concat();
        assert!(codec.decode(&twice, 3).is_err());
        assert!(codec.decode(&twice, 6).is_err());
    }
}
