//! An open archive file, with header and master index in memory. Everything else is read on demand.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::archive_file::ArchiveFile;
use super::codec::Codec;
use super::crypto::BlockKey;
use super::error::{Error, ErrorKind};
use super::header::{Extent, Header};
use super::index_page::{Content, IndexPage, LocatedBlock, PageLayout};
use super::layout::{EntryForm, Layout};
use super::master_index::{MasterIndex, PageRef, StreamIndex};
use super::metadata::StreamOrigin;
use super::page_cache::PageId;
use super::reference_choice::ReferenceMode;
use super::zeros::ZeroHashes;
use super::{BlockHash, OpenOptions, StreamKind, VerifyKey, signature};
use crate::storage::{CountedStorage, Storage};

/// An open archive.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) file: ArchiveFile,
    pub(super) header: Header,
    pub(super) index: MasterIndex,
    pub(super) layout: Layout,
    /// Kind of the main stream according to the metadata, if there is any.
    pub(super) metadata: Option<StreamOrigin>,
    /// Parents in the order of the header: their indexes in the chain, or `None` for those that
    /// couldn't be opened. Empty until the parents have been searched for.
    pub(super) parents: Vec<Option<usize>>,
    /// Operator's decision for ambiguous references.
    pub(super) reference_mode: Option<ReferenceMode>,
    /// True if ranges that no block covers read as zeros.
    pub(super) zero_uncovered: bool,
    entries: EntryForm,
    pub(super) codec: Codec,
    pub(super) key: Option<BlockKey>,
    pub(super) verify_hashes: bool,
}

impl Archive {
    /// Reads and checks header and master index. Verifies digest and signature if required, and
    /// tests the password of an encrypted archive.
    pub(super) fn open(
        path: Arc<Path>,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        let mut archive = Self::open_without_password(path, storage, options)?;
        archive.key = archive.derive_key(options)?;
        archive.test_password(&options.log_limit)?;
        archive.verify_stated_lengths()?;
        Ok(archive)
    }

    /// Opens an archive without a password: the index can be read, but blocks of an encrypted
    /// archive can't.
    pub(super) fn open_without_password(
        path: Arc<Path>,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        if let Some(digests) = &options.digests {
            digests.require(&path)?;
        }
        let storage: Arc<dyn Storage> =
            Arc::new(CountedStorage::new(storage, Arc::clone(&options.read_counters)));
        // Every read from here on is verified against the digest.
        let storage = match &options.digests {
            Some(digests) => digests.verify(&path, storage, options)?,
            None => storage,
        };
        let file = ArchiveFile { path, storage };
        let header = file.header()?;
        let index = file.master_index(&header)?;
        let dictionary = match header.dictionary {
            Some(place) => file.read(place, "read the dictionary")?,
            None => Vec::new(),
        };
        // Index and metadata are read once, so the bytes that are used are those that were
        // verified.
        let metadata = if options.verify_keys.is_empty() {
            file.stream_origin(&header)?
        } else {
            let trailer = file.trailer(&header)?;
            let signed = signature::SignedBytes { index: &index, trailer: &trailer.bytes };
            signature::check(&file, &header, signed, &options.verify_keys)?;
            header.metadata.map(|place| trailer.stream_origin(place))
        };
        let index = MasterIndex::parse(&index, header.index_offset, header.signature.is_some())
            .map_err(|kind| file.error_at(kind, header.index_offset))?;
        let is_remote = file.storage.is_remote();
        let stated = is_remote.then(|| index.entry_form()).flatten();
        let entries = match (stated, index.first_page()) {
            (None, Some(page)) => Some(file.entry_form(page.place)?),
            (form, _) => form,
        };
        let mut archive = Self {
            layout: Layout::of(&header, entries),
            metadata,
            parents: Vec::new(),
            reference_mode: options.reference_mode(&file.path),
            zero_uncovered: options.zero_uncovered,
            entries: entries.unwrap_or(EntryForm::WithHash),
            codec: Codec::new(header.compression, dictionary),
            key: None,
            verify_hashes: options.verify_hashes,
            file,
            header,
            index,
        };
        archive.complete_index()?;
        Ok(archive)
    }

    /// Derives the key of an encrypted archive from the password.
    fn derive_key(&self, options: &OpenOptions) -> Result<Option<BlockKey>, Error> {
        let Some(derivation) = &self.header.encryption else { return Ok(None) };
        let Some(source) = &options.password else {
            return Err(self.file.error(ErrorKind::PasswordNeeded));
        };
        let (got, limit) = (derivation.iterations, options.max_key_iterations);
        if got > limit {
            return Err(self.file.error(ErrorKind::KeyIterations { got, limit }));
        }
        let password = source
            .password()
            .map_err(|error| self.file.error(ErrorKind::Io("get the password", error)))?;
        let derived = options.background.run(|| {
            if options.is_abandoned.load(Ordering::Relaxed) {
                return Err(ErrorKind::Abandoned);
            }
            BlockKey::derive(&password, derivation)
        });
        derived
            .unwrap_or_else(|error| Err(ErrorKind::Io("derive the key", error)))
            .map(Some)
            .map_err(|kind| self.file.error(kind))
    }

    /// Checks the pages against the form of their entries. Determines the ends of streams whose
    /// size the master index doesn't state, or states differently from the blocks.
    fn complete_index(&mut self) -> Result<(), Error> {
        let Self { file, index, entries, header, .. } = self;
        let fail = |kind: ErrorKind| file.error_at(kind, header.index_offset);
        index.check_pages(*entries).map_err(fail)?;
        for stream in index.streams_mut() {
            if stream.has_unstated_size()
                && let [before @ .., last] = stream.pages.as_slice()
            {
                let bytes = |page: &PageRef| file.read(page.place, "read an index page");
                let before = before.last().map(bytes).transpose()?;
                let last = bytes(last)?;
                stream.set_size(before.as_deref(), &last, *entries).map_err(fail)?;
            }
        }
        if let Some(StreamOrigin::Tar { total_bytes }) = self.metadata {
            let main = &mut index.main;
            let start = main.pages.last().map_or(0, |page| page.start_logical);
            if total_bytes < main.size && total_bytes >= start {
                main.end = total_bytes;
            }
        }
        Ok(())
    }

    pub(super) fn is_current(&self) -> bool {
        self.file.storage.is_current()
    }

    pub(super) fn stream(&self, kind: StreamKind) -> &StreamIndex {
        self.index.stream(kind)
    }

    /// Returns the error for byte `at` of a stream, which no block covers.
    pub(super) fn uncovered_error(&self, kind: StreamKind, at: u64) -> Error {
        let StreamIndex { size, end, .. } = *self.stream(kind);
        let kind = if (end..size).contains(&at) {
            ErrorKind::EndsEarly { stream: kind, end, size }
        } else {
            ErrorKind::Uncovered { stream: kind, at }
        };
        self.file.error(kind)
    }

    /// Loads an index page of a stream.
    pub(super) fn load_page(
        &self,
        kind: StreamKind,
        page: usize,
        zeros: &ZeroHashes,
    ) -> Result<IndexPage, Error> {
        self.load_page_and_bytes(kind, page, zeros).map(|(page, _)| page)
    }

    /// Loads an index page and returns its bytes, too.
    pub(super) fn load_page_and_bytes(
        &self,
        kind: StreamKind,
        page: usize,
        zeros: &ZeroHashes,
    ) -> Result<(IndexPage, Vec<u8>), Error> {
        let place = self.page_ref(kind, page)?.place;
        let bytes = self.file.read(place, "read an index page")?;
        Ok((self.parse_page(kind, page, &bytes, zeros)?, bytes))
    }

    /// Parses the bytes of an index page of a stream.
    pub(super) fn parse_page(
        &self,
        kind: StreamKind,
        page: usize,
        bytes: &[u8],
        zeros: &ZeroHashes,
    ) -> Result<IndexPage, Error> {
        let (reference, end) = (self.page_ref(kind, page)?, self.stream(kind).page_end(page));
        let layout = PageLayout {
            form: self.entries,
            references_by_hash: self.layout.references_by_hash(),
            zeros,
        };
        IndexPage::parse(bytes, reference, end, self.header.index_offset, layout)
            .map_err(|kind| self.file.error_at(kind, reference.place.offset))
    }

    /// Returns the location of an index page; `None` if there is no such page.
    pub(super) fn page_place(&self, id: PageId) -> Option<Extent> {
        self.stream(id.stream).pages.get(id.page).map(|page| page.place)
    }

    fn page_ref(&self, kind: StreamKind, page: usize) -> Result<&PageRef, Error> {
        let stream = self.stream(kind);
        stream
            .pages
            .get(page)
            .ok_or_else(|| self.file.error(ErrorKind::Uncovered { stream: kind, at: stream.size }))
    }

    /// Verifies that one of `keys` has signed the archive.
    pub(super) fn check_signature(&self, keys: &[VerifyKey]) -> Result<(), Error> {
        let index = self.file.master_index(&self.header)?;
        let signed = signature::SignedBytes { index: &index, trailer: &[] };
        signature::check(&self.file, &self.header, signed, keys)?;
        // The file may have been written to since it was opened.
        let is_same = MasterIndex::parse(&index, self.header.index_offset, true)
            .is_ok_and(|signed| signed.has_same_pages(&self.index));
        if is_same { Ok(()) } else { Err(self.file.error(ErrorKind::InvalidSignature)) }
    }

    /// Returns the form of the entries of the index pages.
    pub(super) fn entry_form(&self) -> EntryForm {
        self.entries
    }

    /// Returns the number of blocks on all pages of a stream.
    pub(super) fn block_count(&self, kind: StreamKind) -> u64 {
        self.stream(kind).pages.iter().map(|page| u64::from(page.block_count(self.entries))).sum()
    }

    /// Returns the file's length, in bytes.
    pub(super) fn file_length(&self) -> u64 {
        self.file.storage.length()
    }

    /// Returns true if both archives are the same file, or have the same verified bytes.
    pub(super) fn has_bytes_of(&self, other: &Self) -> bool {
        let of = |archive: &Self| archive.file.storage.verified_blake3();
        match (of(self), of(other)) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => {
                let stamp = self.file.storage.stamp();
                stamp.is_some() && stamp == other.file.storage.stamp()
            }
        }
    }

    /// Reads and decodes a block that needs no parent.
    pub(super) fn read_block(&self, block: &LocatedBlock) -> Result<Vec<u8>, Error> {
        let Some(place) = block.entry.stored_place() else { return self.decode(block, &mut []) };
        with_buffer(place.length as usize, |stored| {
            self.file.read_exact_at(stored, place.offset, "read a block")?;
            self.decode(block, stored)
        })
    }

    /// Decodes a block like [`decode`](Self::decode), from a copy of its `stored` bytes.
    pub(super) fn decode_copy(
        &self,
        block: &LocatedBlock,
        stored: &[u8],
    ) -> Result<Vec<u8>, Error> {
        with_buffer(stored.len(), |buffer| {
            buffer.copy_from_slice(stored);
            self.decode(block, buffer)
        })
    }

    /// Reads and decodes a block like [`read_block`](Self::read_block), but only if its stored
    /// bytes are in memory. Returns `None` if they may have to be read from a disk.
    pub(super) fn read_block_in_memory(
        &self,
        block: &LocatedBlock,
    ) -> Option<Result<Vec<u8>, Error>> {
        let Some(place) = block.entry.stored_place() else {
            return Some(self.decode(block, &mut []));
        };
        with_buffer(place.length as usize, |stored| {
            // The error is for the read that waits.
            let is_read = self.file.storage.try_read_exact_at(stored, place.offset);
            is_read.unwrap_or(false).then(|| self.decode(block, stored))
        })
    }

    /// Decodes a block that needs no parent from its `stored` bytes, of which nothing but a
    /// [`stored_place`](IndexEntry::stored_place) has any. They are decrypted in place.
    ///
    /// A stored block passes these steps: CRC-32, decryption, decompression, length, and BLAKE3 if
    /// the index has a hash.
    pub(super) fn decode(&self, block: &LocatedBlock, stored: &mut [u8]) -> Result<Vec<u8>, Error> {
        match block.entry.content {
            Content::Zeros | Content::Contradiction => {
                let zeros = vec![0; block.length as usize];
                check_hash(&zeros, block.entry.hash).map_err(|kind| self.file.error(kind))?;
                Ok(zeros)
            }
            Content::Stored { place, checksum } => self
                .decode_stored(block, stored, checksum)
                .map_err(|kind| self.file.error_at(kind, place.offset)),
            Content::InParent => Err(self.file.error(ErrorKind::Invalid("a block's location"))),
        }
    }

    fn decode_stored(
        &self,
        block: &LocatedBlock,
        stored: &mut [u8],
        checksum: u32,
    ) -> Result<Vec<u8>, ErrorKind> {
        let got = crc32fast::hash(stored);
        if got != checksum {
            return Err(ErrorKind::ChecksumMismatch { got, expected: checksum });
        }
        let compressed = match &self.key {
            Some(key) => key.open(block.number, stored)?,
            None if self.header.encryption.is_some() => return Err(ErrorKind::PasswordNeeded),
            None => stored,
        };
        let decoded = self.codec.decode(compressed, block.length)?;
        if self.verify_hashes {
            check_hash(&decoded, block.entry.hash)?;
        }
        Ok(decoded)
    }
}

/// Calls `work` with this thread's buffer for stored blocks, whose initial content is unspecified.
fn with_buffer<T>(length: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    /// Maximum capacity of a buffer that is kept, in bytes. Larger blocks are rare.
    const KEPT: usize = 1024 * 1024;
    thread_local! {
        static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    let mut buffer = BUFFER.take();
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    let done = work(buffer.get_mut(..length).unwrap_or_default());
    if buffer.capacity() <= KEPT {
        BUFFER.set(buffer);
    }
    done
}

/// Compares a block's bytes with its hash, if the packer recorded one.
fn check_hash(block: &[u8], expected: BlockHash) -> Result<(), ErrorKind> {
    if !expected.is_present() {
        return Ok(());
    }
    let got = BlockHash(*blake3::hash(block).as_bytes());
    if got == expected { Ok(()) } else { Err(ErrorKind::HashMismatch { got, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_buffer_is_reused_unless_it_is_large() {
        const KEPT: usize = 1024 * 1024;
        // Returns the previous content of the buffer's first byte.
        let fill = |length, byte| {
            with_buffer(length, |buffer| {
                assert_eq!(buffer.len(), length);
                let before = buffer[0];
                buffer.fill(byte);
                before
            })
        };
        assert_eq!(fill(1000, 1), 0);
        assert_eq!(fill(1, 2), 1);
        assert_eq!(fill(KEPT, 3), 2);
        assert_eq!(fill(KEPT, 4), 3);
        // A larger buffer is freed after its use.
        assert_eq!(fill(KEPT + 1, 5), 4);
        assert_eq!(fill(1000, 6), 0);
    }
}
