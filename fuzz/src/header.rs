//! The header: it is taken if a naive reader takes it, for what that one reads, and nothing
//! beyond the file is ever read.

use hexz_nbd::snapshot::{Compression, Problem, StreamKind};

use crate::archive::{HEADER, Memory, open};

const MAX_DICTIONARY: u32 = 8 << 20;
const MAX_ITERATIONS: u32 = 10_000_000;
/// A master index of no pages and two empty streams: so many zeros.
const EMPTY_INDEX: u64 = 32;
/// Behind the header there are zeros, up to this length of the file for the most part.
const USUAL: u64 = 1 << 14;

/// The file's length and whether its bare stream is wanted, then the header.
pub fn check(data: &[u8]) {
    let Some((head, header)) = data.split_first_chunk::<9>() else { return };
    let [raw, length @ ..] = *head;
    let length = u64::from_le_bytes(length);
    let length = if raw & 2 == 0 { length % USUAL } else { length };
    let header = header.get(..HEADER).unwrap_or(header);
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
