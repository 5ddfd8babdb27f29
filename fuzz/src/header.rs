//! The header: it is taken if a naive reader takes it, for what that one reads, and nothing
//! beyond the file is ever read.

use arbitrary::{Arbitrary, Unstructured};
use hexz_nbd::snapshot::{Compression, Problem, StreamKind};

use crate::archive::{HEADER, Memory, open};

const MAX_DICTIONARY: u32 = 8 << 20;
const MAX_ITERATIONS: u32 = 10_000_000;
/// A master index of no pages and two empty streams: so many zeros.
const EMPTY_INDEX: u64 = 32;
/// Behind the header there are zeros, up to this length of the file for the most part.
const USUAL: u64 = 1 << 14;

/// How its header is meant, and the file's length; then the header, or what to make one of.
pub fn check(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<9>() else { return };
    let [raw, length @ ..] = *head;
    let length = u64::from_le_bytes(length);
    let length = if raw & 2 == 0 { length % USUAL } else { length };
    let built = Built::arbitrary_take_rest(Unstructured::new(rest)).map(|it| it.header(length));
    let header = match built {
        Ok(built) if raw & 4 != 0 => built,
        _ => rest.to_vec(),
    };
    let header = header.get(..HEADER).unwrap_or(&header);
    let mut bytes = header.to_vec();
    bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));

    let judged = judge(header, length);
    let opened = open(Memory { bytes, length }, raw & 1 != 0, false);
    let Some(judged) = judged else {
        let error = opened.expect_err("a header that makes no sense was taken");
        assert!(!is_about_use(&error.problem), "{error}");
        assert!(!error.to_string().is_empty());
        return;
    };
    let needs_more =
        judged.is_encrypted || judged.has_parents || (judged.is_directory && raw & 1 == 0);
    match opened {
        Ok(snapshot) => {
            assert!(!needs_more);
            assert_eq!(snapshot.block_size(), judged.block_size);
            assert_eq!(snapshot.compression() == Compression::Zstd, judged.is_zstd);
            assert_eq!(snapshot.size(StreamKind::Main), 0);
            assert_eq!(snapshot.size(StreamKind::Auxiliary), 0);
        }
        Err(error) => assert!(needs_more && is_about_use(&error.problem), "{error}"),
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
        let mut out = b"HEXZ\x01\0\0\0\0\0\x01\0".to_vec();
        out.extend(index.to_le_bytes());
        out.extend((self.parents.len() as u64).to_le_bytes());
        for parent in &self.parents {
            out.extend((parent.len() as u64).to_le_bytes());
            out.extend(parent.as_bytes());
        }
        for place in &self.places {
            let Some((start, end, halves)) = place else {
                out.extend([0; 2]);
                continue;
            };
            let start = start.offset(index, length);
            let long = end.offset(index, length).wrapping_sub(start) as u32;
            for (value, left_out) in
                [(start.to_le_bytes().to_vec(), 1), (long.to_le_bytes().to_vec(), 2)]
            {
                let is_there = halves % 16 != left_out;
                out.push(is_there.into());
                out.extend(if is_there { value } else { Vec::new() });
            }
        }
        out.push(self.iterations.is_some().into());
        if let Some(iterations) = self.iterations {
            out.extend([7; 16]);
            out.extend(iterations.to_le_bytes());
        }
        out.extend(u32::from(self.compression % 3).to_le_bytes());
        let [flags @ .., chunking] = self.flags;
        out.extend(flags.map(|flag| flag % 3));
        out.push(chunking % 2);
        out.extend(vec![5; usize::from(chunking % 2) * 12]);
        out
    }
}

/// Whether that isn't the header's fault.
fn is_about_use(problem: &Problem) -> bool {
    matches!(
        problem,
        Problem::PasswordNeeded
            | Problem::DirectoryArchive
            | Problem::ParentMissing { .. }
            | Problem::Io("open this parent", _)
    )
}

#[derive(Debug)]
struct Judged {
    block_size: u32,
    is_zstd: bool,
    is_encrypted: bool,
    is_directory: bool,
    has_parents: bool,
}

fn judge(header: &[u8], length: u64) -> Option<Judged> {
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
    let number =
        |bytes: Vec<u8>| bytes.iter().rev().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));

    if take(4)? != b"HEXZ" || number(take(4)?) != 1 {
        return None;
    }
    let block_size = number(take(4)?) as u32;
    let index = number(take(8)?);
    let parents = number(take(8)?);
    for _ in 0..parents {
        let length = number(take(8)?);
        String::from_utf8(take(length)?).ok()?;
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
    let chunking = number(take(1)?);
    if chunking == 1 {
        take(12)?;
    }
    let is_sane = compression <= 1 && flags.iter().all(|flag| *flag <= 1) && chunking <= 1;
    if !is_sane || region[at..].iter().any(|byte| *byte != 0) {
        return None;
    }
    if iterations.is_some_and(|count| !(1..=MAX_ITERATIONS).contains(&count)) {
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
    if behind.clone().any(|(start, end)| start < index || end > length) {
        return None;
    }
    let index_end = behind.map(|(start, _)| start).min().unwrap_or(length);
    if index < header_end || index_end.checked_sub(index)? != EMPTY_INDEX {
        return None;
    }
    Some(Judged {
        block_size,
        is_zstd: compression == 1,
        is_encrypted: iterations.is_some(),
        is_directory: metadata.is_some(),
        has_parents: parents > 0,
    })
}
