//! Checks of an archive that need its blocks, made when it is opened.

use super::StreamKind;
use super::archive::Archive;
use super::codec;
use super::error::{Error, ErrorKind, printable};
use super::header::Extent;
use super::index_page::Content;
use super::limits::MAX_PROBED_BYTES;
use super::log_limit::LogLimit;
use super::zeros::ZeroHashes;

/// Maximum number of index pages that are searched for a block to test the password with.
const MAX_PASSWORD_TEST_PAGES: usize = 256;

impl Archive {
    /// Compares the lengths on an index page with those of the stored blocks if no other part of
    /// the index would reveal a damaged length, which moves all later blocks. That is the last page
    /// of a stream whose size isn't stated.
    ///
    /// A frame that states its decoded length isn't decoded for this check.
    pub(super) fn verify_stated_lengths(&self) -> Result<(), Error> {
        let zeros = ZeroHashes::default();
        let mut decoded: u64 = 0;
        for kind in StreamKind::ALL {
            let stream = self.stream(kind);
            if !stream.is_size_summed {
                continue;
            }
            let Some(last) = stream.pages.len().checked_sub(1) else { continue };
            for block in self.load_page(kind, last, &zeros)?.blocks() {
                let Content::Stored { place, .. } = block.entry.content else { continue };
                match self.stated_length(place)? {
                    Some(length) if length == block.length => {}
                    Some(length) => {
                        let (got, expected) = (length as usize, block.length);
                        let kind = ErrorKind::LengthMismatch { got, expected };
                        return Err(self.file.error_at(kind, place.offset));
                    }
                    None => {
                        decoded += u64::from(block.length);
                        let (got, limit) = (decoded, MAX_PROBED_BYTES);
                        if got > limit {
                            let what = "the number of bytes to decode to determine a stream's size";
                            return Err(self.file.error(ErrorKind::TooLarge { what, got, limit }));
                        }
                        self.read_block(&block)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the decoded length that a stored block states itself, if it does and isn't
    /// encrypted.
    fn stated_length(&self, place: Extent) -> Result<Option<u32>, Error> {
        if self.header.encryption.is_some() {
            return Ok(None);
        }
        let mut head = [0; codec::MAX_FRAME_HEADER_LEN];
        let count = head.len().min(place.length as usize);
        let head = head.get_mut(..count).unwrap_or_default();
        self.file.read_exact_at(head, place.offset, "read a block")?;
        Ok(self.codec.stated_length(head))
    }

    /// Decrypts one block, so that a wrong password is detected before the archive is served.
    pub(super) fn test_password(&self, log_limit: &LogLimit) -> Result<(), Error> {
        if self.key.is_none() {
            return Ok(());
        }
        let zeros = ZeroHashes::default();
        for kind in StreamKind::ALL {
            let pages = self.stream(kind).pages.len().min(MAX_PASSWORD_TEST_PAGES);
            for page in 0..pages {
                let page = self.load_page(kind, page, &zeros)?;
                let stored = page
                    .blocks()
                    .find(|block| matches!(block.entry.content, Content::Stored { .. }));
                if let Some(block) = stored {
                    return match self.read_block(&block) {
                        Ok(_) => Ok(()),
                        // The CRC-32 matches, so the stored bytes aren't damaged.
                        Err(Error { kind: ErrorKind::AuthenticationTag, .. }) => {
                            Err(self.file.error(ErrorKind::WrongPassword))
                        }
                        Err(error) => Err(error),
                    };
                }
            }
        }
        if let Some(held_back) = log_limit.allow() {
            tracing::warn!(
                reason = "password_not_verified",
                held_back,
                "{}: can't verify the password, since the archive stores none of the first blocks \
                 itself; if it is wrong, reads will fail",
                printable(&self.file.path),
            );
        }
        Ok(())
    }
}
