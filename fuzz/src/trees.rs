//! Tree files: one is taken if it has the head and the length that belong to the archive, and its
//! digest is that of BLAKE3's tree over its values.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};
use hexz_reader::DigestTree;

/// Length of a group, in bytes.
const GROUP: u64 = 256 * 1024;
/// Groups of archives that a sound tree file belongs to, at most.
const MAX_GROUPS: u64 = 40;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    length: u64,
    is_sound: bool,
    /// Bytes of a group, of which there may be fewer.
    group: u8,
    start: &'a [u8],
    file: &'a [u8],
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    if !input.is_sound {
        compare(input.file, input.length);
        return;
    }
    let length = input.length % (MAX_GROUPS * GROUP) + 1;
    let count = length.div_ceil(GROUP);
    // Values that differ, one of which is that of known bytes.
    let mut values: Vec<ChainingValue> = (0..count).map(|at| *hash(at, input.file)).collect();
    let group = u64::from(input.group) % count;
    let mut bytes = input.start.to_vec();
    bytes.resize(usize::try_from((length - group * GROUP).min(GROUP)).unwrap_or(0), 7);
    let known = chaining_value(group, &bytes);
    values[usize::try_from(group).unwrap_or(0)] = known;
    let mut file = head(length);
    values.iter().for_each(|value| file.extend(value));
    let Some(tree) = compare(&file, length) else { return };
    assert!(tree.matches(group, &bytes));
    assert!(!tree.matches(count, &bytes) && !tree.matches(u64::MAX, &bytes));
    assert!(!tree.matches(group, &[]));
    bytes[0] ^= 1;
    assert!(!tree.matches(group, &bytes));

    // The file is written as it was read.
    let mut written = Vec::new();
    tree.write(&mut written).expect("memory");
    assert_eq!(written, file);
    for (wrong, length) in [(&file[1..], length), (&file, length + 1), (&file, length - 1)] {
        compare(wrong, length);
    }
}

fn hash(number: u64, salt: &[u8]) -> Box<ChainingValue> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes()).update(salt);
    Box::new(hasher.finalize().into())
}

/// Reads a tree file, and compares the result with the judge.
fn compare(file: &[u8], length: u64) -> Option<DigestTree> {
    let bytes: Arc<[u8]> = file.into();
    let tree = DigestTree::read(&bytes, length).expect("memory can be read");
    let judged = judge(file, length);
    let digest = tree.as_ref().map(|tree| tree.digest().to_string());
    assert_eq!(digest, judged.map(|digest| blake3::Hash::from(digest).to_string()));
    tree
}

/// Returns the digest of a tree file, if it is one for an archive of `length` bytes.
fn judge(file: &[u8], length: u64) -> Option<[u8; 32]> {
    let values = file.strip_prefix(head(length).as_slice())?;
    let (values, rest) = values.as_chunks::<32>();
    let is_whole = rest.is_empty() && values.len() as u64 == length.div_ceil(GROUP);
    (is_whole && length > GROUP).then(|| root(values))
}

fn head(length: u64) -> Vec<u8> {
    [b"B3TREE\x01\x12".as_slice(), &length.to_le_bytes()].concat()
}

fn root(values: &[ChainingValue]) -> [u8; 32] {
    let (left, right) = halves(values);
    merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).into()
}

fn merge(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [value] => *value,
        _ => {
            let (left, right) = halves(values);
            merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
        }
    }
}

/// The left half has as many values as the largest power of two that leaves some for the right one.
fn halves(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    let mut left = 1;
    while left * 2 < values.len() {
        left *= 2;
    }
    values.split_at(left)
}

fn chaining_value(group: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(group * GROUP);
    hasher.update(bytes);
    hasher.finalize_non_root()
}

#[test]
fn the_judge_is_right_where_it_is_plain() {
    let bytes: Vec<u8> = (0..3 * GROUP + 5).map(|at| (at % 251) as u8).collect();
    let groups = bytes.chunks(usize::try_from(GROUP).expect("64 bits"));
    let values: Vec<_> = (0..).zip(groups).map(|(at, group)| chaining_value(at, group)).collect();
    assert_eq!(root(&values), *blake3::hash(&bytes).as_bytes());
}
