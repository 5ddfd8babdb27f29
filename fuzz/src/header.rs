//! The header: it is taken if a naive reader takes it, for what that one reads, and nothing
//! beyond the file is ever read.
//!
//! There are two forms of it, which differ in the field that names parents. The form is
//! detected; a valid header of one form must never be read as the other and mean something else.

use std::path::Path;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use hexz_reader::summary::ArchiveSummary;
use hexz_reader::{Compression, ErrorKind, OpenOptions, StreamKind};

use crate::archive::{HEADER, Memory, open, put_parent, put_parents};
use crate::naive::little_endian;

const MAX_DICTIONARY: u32 = 8 << 20;
const MAX_ITERATIONS: u32 = 10_000_000;
const MAX_METADATA: u32 = 64 << 20;
const MAX_MASTER_INDEX: u64 = 64 << 20;
/// A master index of no pages and two empty streams: so many zeros.
const EMPTY_INDEX: u64 = 32;
/// Length of a signature, in bytes. Earlier ones stay behind the master index.
const SIGNATURE: u64 = 64;
/// Behind the header there are zeros, up to this length of the file for the most part.
const USUAL: u64 = 1 << 14;

/// How its header is meant, and the file's length; then the header, or what to make one of.
pub fn check(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<9>() else { return };
    let [flags, length @ ..] = *head;
    let length = u64::from_le_bytes(length);
    let length = if flags & 2 == 0 { length % USUAL } else { length };
    let raw = flags & 1 != 0;
    if flags & 8 != 0 {
        let sound = Sound::arbitrary_take_rest(Unstructured::new(rest));
        sound.iter().for_each(|sound| sound.check(raw));
        return;
    }
    let built = Built::arbitrary_take_rest(Unstructured::new(rest)).map(|it| it.header(length));
    let header = match built {
        Ok(built) if flags & 4 != 0 => built,
        _ => rest.to_vec(),
    };
    compare(&header, length, raw);
}

/// Compares what the reader makes of an archive that is a header and zeros with the judge.
fn compare(header: &[u8], length: u64, raw: bool) {
    let header = header.get(..HEADER).unwrap_or(header);
    let mut bytes = header.to_vec();
    bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
    let judged = judge(header, length);
    let facts = facts(Memory { bytes: bytes.clone(), length });
    assert_eq!(facts, judged);

    let opened = open(Memory { bytes, length }, raw, false);
    let Some(judged) = judged else {
        let error = opened.expect_err("a header that makes no sense was taken");
        assert!(!is_about_use(&error.kind), "{error}");
        assert!(!error.to_string().is_empty());
        return;
    };
    let needs_more = judged.iterations.is_some()
        || !judged.parents.is_empty()
        || (judged.is_directory() && !raw);
    match opened {
        Ok(snapshot) => {
            assert!(!needs_more);
            assert_eq!(snapshot.block_size(), judged.block_size);
            assert_eq!(snapshot.compression() == Compression::Zstd, judged.is_zstd);
            assert_eq!(snapshot.size(StreamKind::Main), 0);
            assert_eq!(snapshot.size(StreamKind::Auxiliary), 0);
        }
        Err(error) => assert!(needs_more && is_about_use(&error.kind), "{error}"),
    }
}

/// What the reader says of the header. Neither a password nor parents are needed for that.
fn facts(memory: Memory) -> Option<Meaning> {
    let name = Path::new("/nonexistent/folder/fuzzed.hxz");
    let facts =
        ArchiveSummary::of_storage(name, Arc::new(memory), &OpenOptions::default(), |_| ()).ok()?;
    assert_eq!((facts.main.size, facts.auxiliary.size), (0, 0));
    let manifest = facts.manifest.map(|manifest| manifest.length);
    assert!(manifest.is_none_or(|length| length > MAX_METADATA));
    Some(Meaning {
        block_size: facts.block_size,
        index: facts.master_index_length,
        parents: facts.parents.into_iter().map(|parent| parent.name).collect(),
        dictionary: facts.dictionary_length,
        metadata: manifest.or(facts.metadata.map(|metadata| metadata.length)),
        has_signature: facts.signature.is_some(),
        iterations: facts.key_iterations,
        is_zstd: facts.compression == Compression::Zstd,
        has_variable_blocks: facts.has_variable_blocks,
        chunking: facts
            .chunking
            .map(|chunking| [chunking.average_bits, chunking.smallest, chunking.largest]),
    })
}

/// Form of the field that names parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
enum Form {
    List,
    Optional,
}

const FORMS: [Form; 2] = [Form::List, Form::Optional];

/// The fields of a header, of which none has to be right.
struct Fields<'a> {
    form: Form,
    block_size: u32,
    index: u64,
    parents: &'a [&'a str],
    /// Offset and length of dictionary, metadata and signature.
    places: [(Option<u64>, Option<u32>); 3],
    iterations: Option<u32>,
    compression: u32,
    flags: [u8; 3],
    chunking: Option<[u32; 3]>,
}

impl Fields<'_> {
    fn header(&self) -> Vec<u8> {
        let mut out = b"HEXZ\x01\0\0\0".to_vec();
        out.extend(self.block_size.to_le_bytes());
        out.extend(self.index.to_le_bytes());
        match self.form {
            Form::List => put_parents(&mut out, self.parents),
            Form::Optional => put_parent(&mut out, self.parents.first().copied()),
        }
        for (offset, length) in self.places {
            out.push(offset.is_some().into());
            out.extend(offset.into_iter().flat_map(u64::to_le_bytes));
            out.push(length.is_some().into());
            out.extend(length.into_iter().flat_map(u32::to_le_bytes));
        }
        out.push(self.iterations.is_some().into());
        if let Some(iterations) = self.iterations {
            out.extend([7; 16]);
            out.extend(iterations.to_le_bytes());
        }
        out.extend(self.compression.to_le_bytes());
        out.extend(self.flags);
        out.push(self.chunking.is_some().into());
        out.extend(self.chunking.into_iter().flatten().flat_map(u32::to_le_bytes));
        out
    }
}

/// A header whose places fit together, or nearly.
#[derive(Debug, Arbitrary)]
struct Built<'a> {
    index: Near,
    /// Where dictionary, metadata and signature begin and end, and whether that is said whole.
    places: [Option<(Near, Near, u8)>; 3],
    iterations: Option<u32>,
    compression: u8,
    flags: [u8; 4],
    form: Form,
    parents: Vec<&'a str>,
}

/// A place in the file, by what it is near to.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Near {
    HeaderEnd(i8),
    Index(i8),
    IndexEnd(i8),
    End(i8),
    Any(u64),
}

impl Near {
    fn offset(self, index: u64, length: u64) -> u64 {
        let (near, by) = match self {
            Self::HeaderEnd(by) => (HEADER as u64, by),
            Self::Index(by) => (index, by),
            Self::IndexEnd(by) => (index.wrapping_add(EMPTY_INDEX), by),
            Self::End(by) => (length, by),
            Self::Any(offset) => (offset, 0),
        };
        near.wrapping_add_signed(by.into())
    }
}

impl Built<'_> {
    fn header(&self, length: u64) -> Vec<u8> {
        // By itself it is as far from the end as an empty index is long.
        let index = self.index.offset(length.wrapping_sub(EMPTY_INDEX), length);
        let places = self.places.map(|place| {
            let Some((start, end, halves)) = place else { return (None, None) };
            let start = start.offset(index, length);
            let long = end.offset(index, length).wrapping_sub(start) as u32;
            let is_there = |half: u8| halves % 16 != half;
            (is_there(1).then_some(start), is_there(2).then_some(long))
        });
        let [flags @ .., chunking] = self.flags;
        Fields {
            form: self.form,
            block_size: 65536,
            index,
            parents: &self.parents,
            places,
            iterations: self.iterations,
            compression: u32::from(self.compression % 3),
            flags: flags.map(|flag| flag % 3),
            chunking: (chunking % 2 == 1).then_some([5; 3]),
        }
        .header()
    }
}

/// An archive without blocks in which everything is where it should be: the detection of its
/// form must not fail.
#[derive(Debug, Arbitrary)]
struct Sound<'a> {
    form: Form,
    block_size: u32,
    /// Bytes of blocks, of which nothing is known.
    stored: u32,
    /// Offset from the header's end, and length.
    dictionary: Option<(u32, u32)>,
    metadata: Option<u32>,
    /// Number of earlier signatures that were left behind the master index.
    signature: Option<u8>,
    iterations: Option<u32>,
    is_zstd: bool,
    flags: [bool; 3],
    chunking: Option<[u32; 3]>,
    parents: Vec<&'a str>,
}

impl Sound<'_> {
    fn check(&self, raw: bool) {
        let mut parents: Vec<_> = self.parents.clone();
        parents.retain(|parent| !parent.is_empty() && !parent.contains('\0'));
        let mut chunking = self.chunking.map(|values| values.map(|value| value.max(1)));
        if self.form == Form::Optional {
            parents.truncate(1);
            chunking = None;
        }
        let header_end = HEADER as u64;
        let dictionary = self.dictionary.map(|(offset, length)| {
            (header_end + u64::from(offset), length % (MAX_DICTIONARY + 1))
        });
        let dictionary_end =
            dictionary.map_or(header_end, |(offset, length)| offset + u64::from(length));
        let index = dictionary_end + u64::from(self.stored);
        let left_over = self.signature.map_or(0, |count| u64::from(count) * SIGNATURE);
        let mut end = index + EMPTY_INDEX + left_over;
        // The one after the other, at the end of the file.
        let mut append = |length: Option<u32>| {
            let start = end;
            end += u64::from(length.unwrap_or(0));
            length.map(|length| (start, length))
        };
        let metadata = append(self.metadata);
        let signature = append(self.signature.map(|_| SIGNATURE as u32));
        let iterations = self.iterations.map(|count| count % MAX_ITERATIONS + 1);
        let half = |place: Option<(u64, u32)>| place.unzip();
        let header = Fields {
            form: self.form,
            block_size: self.block_size,
            index,
            parents: &parents,
            places: [dictionary, metadata, signature].map(half),
            iterations,
            compression: self.is_zstd.into(),
            flags: self.flags.map(u8::from),
            chunking,
        }
        .header();
        if header.len() > HEADER {
            return;
        }

        let meant = Meaning {
            block_size: self.block_size,
            index: EMPTY_INDEX + left_over,
            parents: parents.into_iter().map(str::to_owned).collect(),
            dictionary: dictionary.map(|(_, length)| length),
            metadata: self.metadata,
            has_signature: self.signature.is_some(),
            iterations,
            is_zstd: self.is_zstd,
            has_variable_blocks: self.flags[2],
            chunking,
        };
        let nothing_set =
            Meaning { block_size: self.block_size, index: EMPTY_INDEX, ..Meaning::default() };
        for form in FORMS {
            let read = parse(form, &header, end);
            if form == self.form || read.is_some() {
                assert_eq!(read.as_ref(), Some(&meant), "read as {form:?}");
            }
            if form != self.form && read.is_some() {
                assert_eq!(meant, nothing_set);
            }
        }
        assert_eq!(judge(&header, end), Some(meant));
        compare(&header, end, raw);
    }
}

/// Returns true if that isn't the header's fault.
fn is_about_use(kind: &ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::PasswordNeeded
            | ErrorKind::DirectoryArchive
            | ErrorKind::ParentMissing { .. }
            | ErrorKind::Io("open the parent", _)
    )
}

/// What a header says, in either form.
#[derive(Debug, Default, PartialEq, Eq)]
struct Meaning {
    block_size: u32,
    /// Bytes from the master index to whatever is behind it.
    index: u64,
    parents: Vec<String>,
    /// Lengths of dictionary and metadata.
    dictionary: Option<u32>,
    metadata: Option<u32>,
    has_signature: bool,
    iterations: Option<u32>,
    is_zstd: bool,
    has_variable_blocks: bool,
    chunking: Option<[u32; 3]>,
}

impl Meaning {
    /// Returns true if the metadata count as a directory's manifest: here they are zeros, which
    /// are none, unless they are too long to be parsed.
    fn is_directory(&self) -> bool {
        self.metadata.is_some_and(|length| length > MAX_METADATA)
    }
}

/// Reads the header of an archive whose other bytes are zeros: in the form of the list of
/// parents, or else in the older one. The master index has to be an empty one.
fn judge(header: &[u8], length: u64) -> Option<Meaning> {
    let meaning = FORMS.into_iter().find_map(|form| parse(form, header, length))?;
    let behind = meaning.index.checked_sub(EMPTY_INDEX)?;
    let is_index = behind == 0 || (meaning.has_signature && behind.is_multiple_of(SIGNATURE));
    (is_index && meaning.index <= MAX_MASTER_INDEX).then_some(meaning)
}

/// Reads a header in one form, if it fits that.
fn parse(form: Form, header: &[u8], length: u64) -> Option<Meaning> {
    if length < HEADER as u64 {
        return None;
    }
    let mut region = [0; HEADER];
    region[..header.len()].copy_from_slice(header);
    let mut at = 0;
    // The next bytes, if there are as many.
    let mut take = |count: u64| {
        let count = usize::try_from(count).ok()?;
        let taken = region[at..].get(..count)?;
        at += count;
        Some(taken.to_vec())
    };
    let number = |bytes: Vec<u8>| little_endian(&bytes);

    if take(4)? != b"HEXZ" || number(take(4)?) != 1 {
        return None;
    }
    let block_size = number(take(4)?) as u32;
    let index = number(take(8)?);
    let count = match form {
        Form::List => number(take(8)?),
        Form::Optional => Some(number(take(1)?)).filter(|count| *count <= 1)?,
    };
    let mut parents = Vec::new();
    for _ in 0..count {
        let length = number(take(8)?);
        let path = String::from_utf8(take(length)?).ok()?;
        if path.is_empty() || path.contains('\0') {
            return None;
        }
        parents.push(path);
    }
    let mut places = [None; 3];
    for place in &mut places {
        let mut values = [None; 2];
        for (value, width) in values.iter_mut().zip([8, 4]) {
            *value = match number(take(1)?) {
                0 => None,
                1 => Some(number(take(width)?)),
                _ => return None,
            };
        }
        *place = match values {
            [Some(offset), Some(length)] => Some((offset, offset.checked_add(length)?)),
            [None, None] => None,
            _ => return None,
        };
    }
    let iterations = match number(take(1)?) {
        0 => None,
        1 => take(16).and_then(|_| Some(number(take(4)?) as u32)).map(Some)?,
        _ => return None,
    };
    let compression = number(take(4)?);
    let flags = take(3)?;
    let chunking = match (form, number(take(1)?)) {
        (_, 0) => None,
        (Form::List, 1) => {
            let mut values = [0; 3];
            for value in &mut values {
                *value = number(take(4)?) as u32;
            }
            // Nobody cuts by parameters of zero.
            if values.contains(&0) {
                return None;
            }
            Some(values)
        }
        _ => return None,
    };
    if compression > 1
        || flags.iter().any(|flag| *flag > 1)
        || region[at..].iter().any(|byte| *byte != 0)
        || iterations.is_some_and(|count| !(1..=MAX_ITERATIONS).contains(&count))
    {
        return None;
    }
    let [dictionary, metadata, signature] = places;
    let header_end = HEADER as u64;
    if let Some((start, end)) = dictionary
        && (start < header_end || end > index || end - start > MAX_DICTIONARY.into())
    {
        return None;
    }
    let behind = [metadata, signature].into_iter().flatten();
    if index < header_end
        || index >= length
        || behind.clone().any(|(start, end)| start < index || end > length)
    {
        return None;
    }
    let index_end = behind.map(|(start, _)| start).min().unwrap_or(length);
    let long = |(start, end): (u64, u64)| (end - start) as u32;
    Some(Meaning {
        block_size,
        index: index_end - index,
        parents,
        dictionary: dictionary.map(long),
        metadata: metadata.map(long),
        has_signature: signature.is_some(),
        iterations,
        is_zstd: compression == 1,
        has_variable_blocks: flags[2] == 1,
        chunking,
    })
}
