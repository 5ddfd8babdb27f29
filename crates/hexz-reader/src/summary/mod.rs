//! Summary of an archive's content from its header and index alone.
//!
//! Only the first block is read, and no password is needed. Index pages are read one after another,
//! so memory is bounded regardless of the archive's size: data that has to be remembered about
//! blocks ([`LengthHistogram`], `copies.rs`) becomes an estimate when it grows too large. To find
//! blocks in parents that aren't at the expected offset, the index of the parents' hashes is built
//! as for reading, with its own limit ([`limits::MAX_PARENT_BLOCKS`](super::limits)).

mod copies;
mod length_histogram;
mod traversal;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use copies::DistinctCopies;
pub use length_histogram::LengthHistogram;
use traversal::{FaultList, IndexTraversal};

use super::archive::Archive;
use super::chain::{self, ParentLink};
use super::error::Error;
use super::header::{Chunking, Compression, Extent};
use super::image::ImageFormat;
use super::layout::Layout;
use super::metadata::{self, StreamOrigin};
pub use super::metadata::{MAX_METADATA, PackedFile};
use super::{ErrorKind, OpenOptions, Remark, Snapshot, StreamKind};
use crate::storage::Storage;

/// Maximum length of metadata other than a manifest that is included, in bytes.
const MAX_METADATA_EXCERPT: u32 = 4096;

/// Summary of an archive and its content. All lengths are in bytes.
///
/// ```no_run
/// use hexz_reader::OpenOptions;
/// use hexz_reader::summary::ArchiveSummary;
///
/// # fn main() -> Result<(), hexz_reader::Error> {
/// let options = OpenOptions::default();
/// let summary = ArchiveSummary::of_file("disk.hxz".as_ref(), &options, |_file| ())?;
/// println!("written by {}, {} bytes", summary.layout.writers(), summary.main.size);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct ArchiveSummary {
    /// Path of the archive, as given.
    pub path: PathBuf,
    /// Length of the file.
    pub file_length: u64,
    /// Layout of the format, which identifies the versions of Hexz that write it.
    pub layout: Layout,
    /// Nominal block size.
    pub block_size: u32,
    /// Compression of the blocks.
    pub compression: Compression,
    /// Length of the dictionary, if there is one.
    pub dictionary_length: Option<u32>,
    /// Number of key derivation iterations of an encrypted archive.
    pub key_iterations: Option<u32>,
    /// True if the packer set the flag for blocks of different lengths.
    pub has_variable_blocks: bool,
    /// Chunking parameters of the packer.
    pub chunking: Option<Chunking>,
    /// Length of the master index.
    pub master_index_length: u64,
    /// State of the signature, if there is one.
    pub signature: Option<SignatureStatus>,
    /// Manifest, if a directory was packed.
    pub manifest: Option<Manifest>,
    /// Metadata of any other kind.
    pub metadata: Option<OtherMetadata>,
    /// Format of the main stream if it is a disk image format or compressed, and so not a raw disk.
    /// Unknown for encrypted archives.
    pub image: Option<ImageFormat>,
    /// Properties of the archive that are valid but may surprise users.
    pub remarks: Vec<Remark>,
    /// Parents named by the archive and its ancestors.
    pub parents: Vec<ParentEntry>,
    /// Archives of the chain that were opened, starting with the archive itself.
    pub chain: Vec<ChainMember>,
    /// Summary of the main stream (the disk).
    pub main: StreamSummary,
    /// Summary of the auxiliary stream.
    pub auxiliary: StreamSummary,
    /// Totals of the blocks of both streams that are stored in this archive.
    pub stored: StoredTotals,
    /// Faults that header and index reveal.
    pub faults: Vec<Error>,
    /// Number of further faults, which aren't listed.
    pub omitted_faults: u64,
}

/// Validity of a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureStatus {
    /// Not verified, since no key was given.
    NotVerified,
    /// Valid for the content, by one of the given keys.
    Valid,
    /// Not valid by any of the given keys.
    Invalid,
}

/// Totals of the files of a packed directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Length of the manifest itself.
    pub length: u32,
    /// Number of files.
    pub files: u64,
    /// Sum of the files' lengths.
    pub bytes: u64,
}

/// Metadata other than a manifest, such as a commit message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherMetadata {
    /// Length of the metadata.
    pub length: u32,
    /// First 4096 bytes at most; invalid UTF-8 is replaced.
    pub text: String,
}

/// A parent, as named by an archive of the chain.
#[derive(Debug)]
pub struct ParentEntry {
    /// Index in the chain of the archive that names it; 0 is the archive itself.
    pub child: usize,
    /// Name of the parent in that archive.
    pub name: String,
    /// Index of the parent in the chain; `None` if it can't be opened, for a reason listed among
    /// the faults.
    pub archive: Option<usize>,
}

/// An archive of the chain, with totals of the streams' blocks that it stores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainMember {
    /// Path of the archive.
    pub path: PathBuf,
    /// Number of generations from the archive itself: 0 is the archive itself, 1 a parent.
    pub depth: u32,
    /// Number of blocks of the streams that are stored there, without zeros.
    pub blocks: u64,
    /// Length of these blocks in the streams.
    pub bytes: u64,
}

/// Number and length of a set of blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockTotals {
    /// Number of blocks.
    pub blocks: u64,
    /// Number of bytes of the stream.
    pub bytes: u64,
}

impl BlockTotals {
    fn add(&mut self, length: u32) {
        self.blocks += 1;
        self.bytes += u64::from(length);
    }
}

/// Summary of a stream. Each block whose index page can be read is counted in exactly one of
/// `stored`, `zeros`, `in_parents`, `ambiguous`, `unresolvable` and `contradictory`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamSummary {
    /// Size of the stream.
    pub size: u64,
    /// Number of index pages.
    pub pages: u64,
    /// Sum of the index pages' lengths.
    pub page_bytes: u64,
    /// Distribution of block lengths.
    pub lengths: LengthHistogram,
    /// Blocks that are stored in this archive.
    pub stored: BlockTotals,
    /// Blocks that are known to be zeros without reading them.
    pub zeros: BlockTotals,
    /// Blocks among `zeros` that are stored nevertheless, as ordinary blocks.
    pub stored_zeros: BlockTotals,
    /// Blocks that an ancestor has.
    pub in_parents: BlockTotals,
    /// Blocks that mean an ancestor's bytes by offset or by hash. Only reading them would show if
    /// both are the same.
    pub ambiguous: BlockTotals,
    /// Blocks that none of the opened ancestors has.
    pub unresolvable: BlockTotals,
    /// Blocks whose entry claims zeros but has the hash of other bytes.
    pub contradictory: BlockTotals,
    /// Blocks on pages that can't be read, and bytes that no page covers.
    pub unreadable: BlockTotals,
}

/// Totals of the blocks of both streams that are stored in the archive's own file, including stored
/// zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredTotals {
    /// Number of blocks with a stored copy.
    pub blocks: u64,
    /// Length of these blocks in the streams.
    pub bytes: u64,
    /// Total length of their copies if no copy were shared.
    pub undeduplicated_bytes: u64,
    /// Number of distinct copies.
    pub copies: u64,
    /// Total length of the distinct copies.
    pub copy_bytes: u64,
    /// True if `copies` and `copy_bytes` are estimates, since there are too many copies to remember
    /// each. The error is at most 0.3 % in 99 of 100 archives.
    pub is_estimate: bool,
}

impl StoredTotals {
    /// Returns the number of blocks that share a copy with an earlier block.
    pub fn duplicates(&self) -> u64 {
        self.blocks.saturating_sub(self.copies)
    }

    /// Returns the number of bytes saved by sharing copies.
    pub fn saved(&self) -> u64 {
        self.undeduplicated_bytes.saturating_sub(self.copy_bytes)
    }
}

impl ArchiveSummary {
    /// Inspects the archive at `path`. Calls `on_file` for every file of a packed directory.
    /// Ignores the password and the digests of the options; an invalid signature is a fault, not an
    /// error.
    ///
    /// # Errors
    /// The file, header or master index can't be read or is damaged. Other problems are listed
    /// among the [faults](ArchiveSummary::faults).
    pub fn of_file(
        path: &Path,
        options: &OpenOptions,
        on_file: impl FnMut(PackedFile),
    ) -> Result<Self, Error> {
        summarize(path, None, options, on_file)
    }

    /// Inspects an archive that isn't a file, as [`Snapshot::from_storage`] opens it.
    ///
    /// # Errors
    /// As for [`ArchiveSummary::of_file`].
    pub fn of_storage(
        name: &Path,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        on_file: impl FnMut(PackedFile),
    ) -> Result<Self, Error> {
        summarize(name, Some(storage), options, on_file)
    }

    /// Returns true if header and index reveal no fault.
    pub fn is_sound(&self) -> bool {
        self.faults.is_empty() && self.signature != Some(SignatureStatus::Invalid)
    }

    /// Returns both streams, including empty ones.
    pub fn streams(&self) -> [(StreamKind, &StreamSummary); 2] {
        [(StreamKind::Main, &self.main), (StreamKind::Auxiliary, &self.auxiliary)]
    }
}

fn summarize(
    path: &Path,
    storage: Option<Arc<dyn Storage>>,
    options: &OpenOptions,
    mut on_file: impl FnMut(PackedFile),
) -> Result<ArchiveSummary, Error> {
    // An invalid signature is reported as a fault and must not prevent opening the archive.
    let plain =
        OpenOptions { verify_keys: Arc::default(), digests: None, raw: true, ..options.clone() };
    let (chain, links) = chain::open_for_index(path, storage, &plain)?;
    let mut faults = FaultList::default();
    let (parents, depths) = parents(links, chain.len(), &mut faults);
    let snapshot = Snapshot::from_chain(chain, &plain)?;
    let own = snapshot.own();
    let (mut manifest, mut other) = (None, None);
    match (own.header.metadata, own.metadata) {
        (Some(place), Some(StreamOrigin::Manifest)) => {
            let (read, error) = read_manifest(own, place, &mut on_file);
            error.into_iter().for_each(|error| faults.add(error));
            manifest = Some(read);
        }
        (Some(place), Some(_)) => match read_other_metadata(own, place) {
            Ok(read) => other = Some(read),
            Err(error) => faults.add(error),
        },
        _ => {}
    }
    let mut traversal = IndexTraversal {
        snapshot: &snapshot,
        holders: holders(&snapshot, &depths),
        copies: DistinctCopies::default(),
        stored: StoredTotals::default(),
        faults,
    };
    let [main, auxiliary] = StreamKind::ALL.map(|kind| traversal.summarize_stream(own, kind));
    let distinct = traversal.copies.totals();
    let stored = StoredTotals {
        copies: distinct.copies,
        copy_bytes: distinct.bytes,
        is_estimate: distinct.is_estimate,
        ..traversal.stored
    };
    Ok(ArchiveSummary {
        path: path.to_owned(),
        file_length: own.file_length(),
        block_size: own.header.block_size,
        layout: own.layout,
        compression: own.header.compression,
        dictionary_length: own.header.dictionary.map(|place| place.length),
        key_iterations: own.header.encryption.map(|derivation| derivation.iterations),
        has_variable_blocks: own.header.has_variable_blocks,
        chunking: own.header.chunking,
        master_index_length: own.header.index_end - own.header.index_offset,
        signature: signature_status(own, options, &mut traversal.faults)?,
        manifest,
        metadata: other,
        // Whether its first block can be read is left to `verify`.
        image: snapshot.image_format().ok().flatten(),
        remarks: snapshot.remarks(),
        parents,
        chain: traversal.holders,
        main,
        auxiliary,
        stored,
        faults: traversal.faults.listed,
        omitted_faults: traversal.faults.omitted,
    })
}

fn read_manifest(
    own: &Archive,
    place: Extent,
    on_file: &mut impl FnMut(PackedFile),
) -> (Manifest, Option<Error>) {
    let mut manifest = Manifest { length: place.length, ..Manifest::default() };
    let fail = |kind: ErrorKind| own.file.error_at(kind, place.offset);
    if place.length > MAX_METADATA {
        let what = "the manifest's length in bytes";
        let (got, limit) = (place.length.into(), MAX_METADATA.into());
        return (manifest, Some(fail(ErrorKind::TooLarge { what, got, limit })));
    }
    let read = metadata::for_each_file(own.file.storage.as_ref(), place, &mut |file| {
        manifest.files += 1;
        manifest.bytes = manifest.bytes.saturating_add(file.size);
        on_file(file);
    });
    let error = read.err().map(|error| {
        fail(match error.io_error_kind() {
            Some(kind) => ErrorKind::Io("read the manifest", kind.into()),
            None => ErrorKind::Invalid("the manifest of files"),
        })
    });
    (manifest, error)
}

fn read_other_metadata(own: &Archive, place: Extent) -> Result<OtherMetadata, Error> {
    let mut shown = vec![0; place.length.min(MAX_METADATA_EXCERPT) as usize];
    own.file.read_exact_at(&mut shown, place.offset, "read the metadata")?;
    let text = String::from_utf8_lossy(&shown).into_owned();
    Ok(OtherMetadata { length: place.length, text })
}

/// Returns the parents, and for each archive of the chain the number of generations to it.
fn parents(
    links: Vec<ParentLink>,
    archives: usize,
    faults: &mut FaultList,
) -> (Vec<ParentEntry>, Vec<u32>) {
    let mut depths = vec![0; archives];
    let parents = links.into_iter().map(|link| {
        let depth = depths.get(link.child).map_or(1, |child: &u32| child + 1);
        let found = link.found.map_err(|error| faults.add(error)).ok();
        // Links are ordered by distance, so the first path to an archive is the shortest.
        if let Some(own) = found.and_then(|place| depths.get_mut(place))
            && *own == 0
        {
            *own = depth;
        }
        ParentEntry { child: link.child, name: link.name, archive: found }
    });
    (parents.collect(), depths)
}

fn holders(snapshot: &Snapshot, depths: &[u32]) -> Vec<ChainMember> {
    let archives = snapshot.chain.iter().zip(depths);
    archives
        .map(|(archive, &depth)| ChainMember {
            path: archive.file.path.to_path_buf(),
            depth,
            blocks: 0,
            bytes: 0,
        })
        .collect()
}

fn signature_status(
    own: &Archive,
    options: &OpenOptions,
    faults: &mut FaultList,
) -> Result<Option<SignatureStatus>, Error> {
    if options.verify_keys.is_empty() {
        return Ok(own.header.signature.map(|_| SignatureStatus::NotVerified));
    }
    match own.check_signature(&options.verify_keys) {
        Ok(()) => Ok(Some(SignatureStatus::Valid)),
        Err(error) => {
            let is_there = own.header.signature.is_some();
            faults.add(error);
            Ok(is_there.then_some(SignatureStatus::Invalid))
        }
    }
}
