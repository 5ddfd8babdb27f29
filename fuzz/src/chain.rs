//! A naive judge of a chain of archives: the answer for each byte of each stream, by the rule of
//! which bytes a reference to a parent means. It is given what was written, not the files.

use crate::archive::Layout;

/// An archive of the chain, as it was written. All its stored blocks are undamaged.
#[derive(Debug)]
pub struct Archive {
    pub layout: Layout,
    /// Positions of its parents in the chain, all of them behind its own.
    pub parents: Vec<usize>,
    pub streams: [Vec<Block>; 2],
}

/// A block of a stream.
#[derive(Debug, Clone)]
pub struct Block {
    pub start: usize,
    pub length: usize,
    /// Zeros where there is none.
    pub hash: [u8; 32],
    pub content: Content,
}

#[derive(Debug, Clone)]
pub enum Content {
    /// These bytes, whether they are stored or known to be zeros.
    Bytes(Vec<u8>),
    /// Those of a parent.
    Reference,
}

impl Block {
    fn end(&self) -> usize {
        self.start + self.length
    }

    fn has_hash(&self) -> bool {
        self.hash != [0; 32]
    }
}

/// What the reader may answer for a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The byte, if there is a right one.
    pub byte: Option<u8>,
    /// True if the reader may say that the reference is ambiguous.
    pub may_be_ambiguous: bool,
    /// True if the reader may fail in another way.
    pub may_fail: bool,
}

const FAILURE: Answer = Answer { byte: None, may_be_ambiguous: false, may_fail: true };
const AMBIGUITY: Answer = Answer { byte: None, may_be_ambiguous: true, may_fail: false };

/// The answers for both streams of an archive.
pub type Answers = [Vec<Answer>; 2];

fn right(bytes: &[u8]) -> Vec<Answer> {
    let answer = |byte: &u8| Answer { byte: Some(*byte), may_be_ambiguous: false, may_fail: false };
    bytes.iter().map(answer).collect()
}

/// The bytes, if there is a right one for each.
pub fn bytes_of(answers: &[Answer]) -> Option<Vec<u8>> {
    answers.iter().map(|answer| answer.byte).collect()
}

/// The answers for each archive of the chain.
pub fn judge(chain: &[Archive]) -> Vec<Answers> {
    let empty = || [Vec::new(), Vec::new()];
    let mut judged: Vec<Answers> = chain.iter().map(|_| empty()).collect();
    for (archive, Archive { streams, .. }) in chain.iter().enumerate().rev() {
        for (stream, blocks) in streams.iter().enumerate() {
            let answers = |block| block_answers(chain, &judged, archive, stream, block);
            judged[archive][stream] = blocks.iter().flat_map(answers).collect();
        }
    }
    judged
}

/// The answers for a block, when those for all ancestors are known.
fn block_answers(
    chain: &[Archive],
    judged: &[Answers],
    archive: usize,
    stream: usize,
    block: &Block,
) -> Vec<Answer> {
    if let Content::Bytes(bytes) = &block.content {
        return right(bytes);
    }
    let Archive { layout, parents, .. } = &chain[archive];
    let by_hash = by_hash(chain, block);
    let only_by_hash = || match by_hash {
        Some(bytes) => right(bytes),
        None => vec![FAILURE; block.length],
    };
    if *layout == Layout::D {
        return only_by_hash();
    }
    let by_offset: Vec<Answer> = match parents.as_slice() {
        [parent] => (block.start..block.end())
            .map(|at| judged[*parent][stream].get(at).copied().unwrap_or(FAILURE))
            .collect(),
        _ => vec![FAILURE; block.length],
    };
    if !block.has_hash() {
        return by_offset;
    }
    // Nobody writes references by offset into an archive with several parents.
    let covering = covering(chain, archive, stream, block);
    if parents.len() != 1 || covering.is_empty() {
        return only_by_hash();
    }
    let is_elsewhere =
        covering.iter().any(|other| (other.start, other.length) != (block.start, block.length));
    let answers = match (bytes_of(&by_offset), by_hash) {
        // Nobody has a block with that hash, so it can't be meant.
        (_, None) => by_offset.clone(),
        (Some(place), Some(hash)) if place == hash => right(hash),
        (Some(_), Some(_)) if is_elsewhere => vec![AMBIGUITY; block.length],
        // It is where that hash is covered, so by hash, which whoever reads may doubt.
        (Some(_), Some(hash)) => {
            let doubted = |answer| Answer { may_be_ambiguous: true, ..answer };
            right(hash).into_iter().map(doubted).collect()
        }
        // What is meant by offset isn't known, and may be these bytes.
        (None, Some(hash)) => right(hash),
    };
    // Comparing both takes all bytes at the offset, whichever are asked for.
    let may_be_ambiguous = by_offset.iter().any(|answer| answer.may_be_ambiguous);
    let may_fail = by_offset.iter().any(|answer| answer.may_fail);
    let either = |answer: Answer| Answer {
        byte: answer.byte,
        may_be_ambiguous: answer.may_be_ambiguous || may_be_ambiguous,
        may_fail: answer.may_fail || may_fail,
    };
    answers.into_iter().map(either).collect()
}

/// The blocks of ancestors, of the same stream, that cover a block's start and have its hash.
fn covering<'a>(
    chain: &'a [Archive],
    archive: usize,
    stream: usize,
    block: &Block,
) -> Vec<&'a Block> {
    let is_covering = |other: &&Block| {
        (other.start..other.end()).contains(&block.start) && other.hash == block.hash
    };
    let ancestors = ancestors(chain, archive).into_iter();
    ancestors.flat_map(|it| &chain[it].streams[stream]).filter(is_covering).collect()
}

/// The bytes of the block with that hash and that length. Any archive behind the first one will
/// do, as equal hashes are equal bytes.
fn by_hash<'a>(chain: &'a [Archive], block: &Block) -> Option<&'a [u8]> {
    let others = chain[1..].iter().flat_map(|archive| archive.streams.iter().flatten());
    others.filter(|other| block.has_hash() && other.hash == block.hash).find_map(|other| {
        match &other.content {
            Content::Bytes(bytes) if bytes.len() == block.length => Some(bytes.as_slice()),
            _ => None,
        }
    })
}

fn ancestors(chain: &[Archive], archive: usize) -> Vec<usize> {
    let mut found = chain[archive].parents.clone();
    for parent in &chain[archive].parents {
        found.extend(ancestors(chain, *parent));
    }
    found
}
