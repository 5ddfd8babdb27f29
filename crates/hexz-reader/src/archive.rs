//! An open archive file, with header and master index in memory. Everything else is read on demand.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::codec::{self, Codec};
use super::crypto::BlockKey;
use super::error::{Error, ErrorKind, printable};
use super::header::{Extent, HEADER_REGION, Header, HeaderRegion};
use super::index::{
    Content, IndexPage, LocatedBlock, MasterIndex, PageLayout, PageRef, StreamIndex,
};
use super::layout::{EntryForm, Layout, PAGE_HEADER_LEN};
use super::limits::{MAX_MASTER_INDEX, MAX_PROBED_BYTES};
use super::log_limit::LogLimit;
use super::metadata::{self, MAX_METADATA, StreamOrigin};
use super::references::ReferenceMode;
use super::zeros::ZeroHashes;
use super::{BlockHash, OpenOptions, StreamKind, VerifyKey, signature};
use crate::storage::{CountedStorage, Storage};

/// Maximum number of index pages that are searched for a block to test the password with.
const MAX_PASSWORD_TEST_PAGES: usize = 256;

/// An open archive.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) path: Arc<Path>,
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
    storage: Arc<dyn Storage>,
    codec: Codec,
    key: Option<BlockKey>,
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
        let archive = Self::open_without_password(path, storage, options)?;
        let key = match (&archive.header.encryption, &options.password) {
            (None, _) => None,
            (Some(_), None) => return Err(ErrorKind::PasswordNeeded.of(&archive.path)),
            (Some(derivation), Some(source)) => {
                let (got, limit) = (derivation.iterations, options.max_key_iterations);
                if got > limit {
                    return Err(ErrorKind::KeyIterations { got, limit }.of(&archive.path));
                }
                let password = source
                    .password()
                    .map_err(|error| ErrorKind::Io("get its password", error).of(&archive.path))?;
                let derived = options.background.run(|| {
                    if options.is_abandoned.load(Ordering::Relaxed) {
                        return Err(ErrorKind::Abandoned);
                    }
                    BlockKey::derive(&password, derivation)
                });
                let key = derived
                    .map_err(|error| ErrorKind::Io("derive its key", error))
                    .and_then(|key| key);
                Some(key.map_err(|kind| kind.of(&archive.path))?)
            }
        };
        let archive = Self { key, ..archive };
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
            Some(digests) => digests.verify(&path, storage, &options.digest_memory)?,
            None => storage,
        };
        let header = read_header(&path, storage.as_ref())?;
        let index = read_master_index(&path, storage.as_ref(), &header)?;
        let dictionary = match header.dictionary {
            Some(place) => read(&path, storage.as_ref(), place, "read the dictionary")?,
            None => Vec::new(),
        };
        // Index and metadata are read once, so the bytes that are used are those that were
        // verified.
        let metadata = if options.verify_keys.is_empty() {
            classify_metadata(&path, storage.as_ref(), &header)?
        } else {
            let trailer = Trailer::read(&path, storage.as_ref(), &header)?;
            let signed = signature::SignedBytes { index: &index, trailer: &trailer.bytes };
            signature::check(&path, storage.as_ref(), &header, signed, &options.verify_keys)?;
            header.metadata.map(|place| trailer.classify(place))
        };
        let index = MasterIndex::parse(&index, header.index_offset, header.signature.is_some())
            .map_err(|kind| kind.at(&path, header.index_offset))?;
        let entries = match index.first_page() {
            Some(page) => Some(entry_form(&path, storage.as_ref(), page.place)?),
            None => None,
        };
        let mut archive = Self {
            layout: Layout::of(&header, entries),
            metadata,
            parents: Vec::new(),
            reference_mode: options.reference_mode(&path),
            zero_uncovered: options.zero_uncovered,
            entries: entries.unwrap_or(EntryForm::WithHash),
            codec: Codec::new(header.compression, dictionary),
            key: None,
            verify_hashes: options.verify_hashes,
            path,
            header,
            index,
            storage,
        };
        archive.complete_index()?;
        Ok(archive)
    }

    /// Checks the pages against the form of their entries. Determines the ends of streams whose
    /// size the master index doesn't state, or states differently from the blocks.
    fn complete_index(&mut self) -> Result<(), Error> {
        let (path, offset) = (&self.path, self.header.index_offset);
        let fail = |kind: ErrorKind| kind.at(path, offset);
        self.index.check_pages(self.entries).map_err(fail)?;
        for stream in self.index.streams_mut() {
            if stream.has_unstated_size()
                && let [before @ .., last] = stream.pages.as_slice()
            {
                let storage = self.storage.as_ref();
                let bytes = |page: &PageRef| read(path, storage, page.place, "read an index page");
                let before = before.last().map(bytes).transpose()?;
                let last = bytes(last)?;
                stream.set_size(before.as_deref(), &last, self.entries).map_err(fail)?;
            }
        }
        if let Some(StreamOrigin::Tar { total_bytes }) = self.metadata {
            let main = &mut self.index.main;
            let start = main.pages.last().map_or(0, |page| page.start_logical);
            if total_bytes < main.size && total_bytes >= start {
                main.end = total_bytes;
            }
        }
        Ok(())
    }

    pub(super) fn is_current(&self) -> bool {
        self.storage.is_current()
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
        kind.of(&self.path)
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
        let stream = self.stream(kind);
        let place = stream
            .pages
            .get(page)
            .ok_or_else(|| ErrorKind::Uncovered { stream: kind, at: stream.size }.of(&self.path))?;
        let bytes = read(&self.path, self.storage.as_ref(), place.place, "read an index page")?;
        let layout = PageLayout {
            form: self.entries,
            references_by_hash: self.layout.references_by_hash(),
            zeros,
        };
        IndexPage::parse(&bytes, place, stream.page_end(page), self.header.index_offset, layout)
            .map(|page| (page, bytes))
            .map_err(|kind| kind.at(&self.path, place.place.offset))
    }

    /// Verifies that one of `keys` has signed the archive.
    pub(super) fn check_signature(&self, keys: &[VerifyKey]) -> Result<(), Error> {
        let index = read_master_index(&self.path, self.storage.as_ref(), &self.header)?;
        let signed = signature::SignedBytes { index: &index, trailer: &[] };
        signature::check(&self.path, self.storage.as_ref(), &self.header, signed, keys)?;
        // The file may have been written to since it was opened.
        let is_same = MasterIndex::parse(&index, self.header.index_offset, true)
            .is_ok_and(|signed| signed.has_same_pages(&self.index));
        if is_same { Ok(()) } else { Err(ErrorKind::InvalidSignature.of(&self.path)) }
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
        self.storage.length()
    }

    /// Returns true if both archives are the same file, or have the same verified bytes.
    pub(super) fn has_bytes_of(&self, other: &Self) -> bool {
        let of = |archive: &Self| archive.storage.verified_blake3();
        match (of(self), of(other)) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.storage.stamp().is_some_and(|stamp| Some(stamp) == other.storage.stamp()),
        }
    }

    /// Returns the storage from which the archive is read.
    pub(super) fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    /// Reads and decodes a block that needs no parent. A stored block passes these steps: CRC-32,
    /// decryption, decompression, length, and BLAKE3 if the index has a hash.
    pub(super) fn read_block(&self, block: &LocatedBlock) -> Result<Vec<u8>, Error> {
        let (place, checksum) = match block.entry.content {
            Content::Zeros | Content::Contradiction => {
                let zeros = vec![0; block.length as usize];
                check_hash(&zeros, block.entry.hash).map_err(|kind| kind.of(&self.path))?;
                return Ok(zeros);
            }
            Content::Stored { place, checksum } => (place, checksum),
            Content::InParent => {
                return Err(ErrorKind::Invalid("a block's place in the file").of(&self.path));
            }
        };
        with_buffer(place.length as usize, |stored| {
            self.storage
                .read_exact_at(stored, place.offset)
                .map_err(|error| ErrorKind::from_read_error("read a block", error))
                .and_then(|()| self.decode(stored, checksum, block))
                .map_err(|kind| kind.at(&self.path, place.offset))
        })
    }

    fn decode(
        &self,
        stored: &mut [u8],
        checksum: u32,
        block: &LocatedBlock,
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

    /// Compares the lengths on an index page with those of the stored blocks if no other part of
    /// the index would reveal a damaged length, which moves all later blocks. That is the last page
    /// of a stream whose size isn't stated.
    ///
    /// A frame that states its decoded length isn't decoded for this check.
    fn verify_stated_lengths(&self) -> Result<(), Error> {
        let zeros = ZeroHashes::default();
        let mut decoded: u64 = 0;
        for kind in [StreamKind::Main, StreamKind::Auxiliary] {
            let stream = self.stream(kind);
            if !stream.is_size_summed {
                continue;
            }
            let Some(last) = stream.pages.len().checked_sub(1) else { continue };
            for block in self.load_page(kind, last, &zeros)?.blocks() {
                let Content::Stored { place, .. } = block.entry.content else { continue };
                let fail = |kind: ErrorKind| kind.at(&self.path, place.offset);
                match self.stated_length(place).map_err(fail)? {
                    Some(length) if length == block.length => {}
                    Some(length) => {
                        let (got, expected) = (length as usize, block.length);
                        return Err(fail(ErrorKind::LengthMismatch { got, expected }));
                    }
                    None => {
                        decoded += u64::from(block.length);
                        if decoded > MAX_PROBED_BYTES {
                            return Err(ErrorKind::TooLarge {
                                what: "what has to be decoded to learn the stream's size, in bytes",
                                got: decoded,
                                limit: MAX_PROBED_BYTES,
                            }
                            .of(&self.path));
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
    fn stated_length(&self, place: Extent) -> Result<Option<u32>, ErrorKind> {
        if self.header.encryption.is_some() {
            return Ok(None);
        }
        let mut head = [0; codec::MAX_FRAME_HEADER_LEN];
        let count = head.len().min(place.length as usize);
        let head = head.get_mut(..count).unwrap_or_default();
        self.storage
            .read_exact_at(head, place.offset)
            .map_err(|error| ErrorKind::from_read_error("read a block", error))?;
        Ok(self.codec.stated_length(head))
    }

    /// Decrypts one block, so that a wrong password is detected before the archive is served.
    fn test_password(&self, log_limit: &LogLimit) -> Result<(), Error> {
        if self.key.is_none() {
            return Ok(());
        }
        let zeros = ZeroHashes::default();
        for kind in [StreamKind::Main, StreamKind::Auxiliary] {
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
                            Err(ErrorKind::WrongPassword.of(&self.path))
                        }
                        Err(error) => Err(error),
                    };
                }
            }
        }
        if let Some(held_back) = log_limit.allow() {
            tracing::warn!(
                held_back,
                "{}: the password could not be tried, since no block near the beginning of its \
                 streams is its own; if it is wrong, reads will fail",
                printable(&self.path),
            );
        }
        Ok(())
    }
}

fn classify_metadata(
    path: &Arc<Path>,
    storage: &dyn Storage,
    header: &Header,
) -> Result<Option<StreamOrigin>, Error> {
    let Some(place) = header.metadata else { return Ok(None) };
    if place.length > MAX_METADATA {
        return Ok(Some(StreamOrigin::TOO_LONG));
    }
    metadata::classify(metadata::reader(storage, place))
        .map(Some)
        .map_err(|error| ErrorKind::from_read_error("read its metadata", error).of(path))
}

/// The bytes between master index and end of the metadata: metadata and replaced signatures. Empty
/// if they are longer than the metadata that can be parsed.
struct Trailer {
    offset: u64,
    bytes: Vec<u8>,
}

impl Trailer {
    fn read(path: &Arc<Path>, storage: &dyn Storage, header: &Header) -> Result<Self, Error> {
        let offset = header.index_end;
        let end = header.metadata.and_then(Extent::end).unwrap_or(offset);
        let length = u32::try_from(end.saturating_sub(offset)).unwrap_or(u32::MAX);
        let length = if length > MAX_METADATA { 0 } else { length };
        let bytes = read(path, storage, Extent { offset, length }, "read its metadata")?;
        Ok(Self { offset, bytes })
    }

    /// Classifies the main stream by the metadata at `place`.
    fn classify(&self, place: Extent) -> StreamOrigin {
        let start = place.offset.checked_sub(self.offset);
        let range = start.and_then(|start| usize::try_from(start).ok());
        let bytes = range.and_then(|start| self.bytes.get(start..)?.get(..place.length as usize));
        // Reading from memory can't fail.
        bytes.and_then(|bytes| metadata::classify(bytes).ok()).unwrap_or(StreamOrigin::TOO_LONG)
    }
}

/// Determines the form of the entries from the archive's first page, at `place`.
fn entry_form(path: &Arc<Path>, storage: &dyn Storage, place: Extent) -> Result<EntryForm, Error> {
    let head = Extent { length: PAGE_HEADER_LEN, ..place };
    let head = read(path, storage, head, "read an index page")?;
    let count = head.first_chunk().map(|count| u64::from_le_bytes(*count)).unwrap_or_default();
    EntryForm::of_page(place.length, count).ok_or_else(|| {
        ErrorKind::Invalid("an index page's number of blocks").at(path, place.offset)
    })
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

fn read_header(path: &Arc<Path>, storage: &dyn Storage) -> Result<Header, Error> {
    let length = storage.length();
    let mut region: Box<HeaderRegion> = Box::new([0; HEADER_REGION]);
    let there = region.get_mut(..usize::try_from(length).unwrap_or(usize::MAX));
    let result = match there {
        // The file is shorter than a header, but its start may still identify another file type.
        Some(part) => {
            storage
                .read_exact_at(part, 0)
                .map_err(|e| ErrorKind::from_read_error("read the header", e).of(path))?;
            let foreign = !part.starts_with(b"HEXZ");
            Err(if foreign { ErrorKind::NotHexz } else { ErrorKind::Truncated("its header") })
        }
        None => {
            storage
                .read_exact_at(region.as_mut_slice(), 0)
                .map_err(|e| ErrorKind::from_read_error("read the header", e).of(path))?;
            Header::parse(&region, length)
        }
    };
    result.map_err(|kind| kind.of(path))
}

/// Reads the master index without parsing it: its signature is verified first.
fn read_master_index(
    path: &Arc<Path>,
    storage: &dyn Storage,
    header: &Header,
) -> Result<Vec<u8>, Error> {
    let offset = header.index_offset;
    let length = header.index_end - offset;
    let too_large = ErrorKind::TooLarge {
        what: "the master index's length in bytes",
        got: length,
        limit: MAX_MASTER_INDEX,
    };
    let length = u32::try_from(length)
        .ok()
        .filter(|&length| u64::from(length) <= MAX_MASTER_INDEX)
        .ok_or(too_large.at(path, offset))?;
    read(path, storage, Extent { offset, length }, "read the master index")
}

/// Reads the bytes at `place`, whose length was checked against its limit during parsing.
fn read(
    path: &Arc<Path>,
    storage: &dyn Storage,
    place: Extent,
    purpose: &'static str,
) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; place.length as usize];
    storage
        .read_exact_at(&mut bytes, place.offset)
        .map_err(|error| ErrorKind::from_read_error(purpose, error).at(path, place.offset))?;
    Ok(bytes)
}
