//! Layout of the files. Pure.
//!
//! ```text
//! chunks   slot 0 | slot 1 | …                    256 KiB each, the bytes of one chunk
//! slots    head | entry 0 | entry 1 | …           4 KiB, then 64 bytes each
//! objects  record 0 | record 1 | …                2 KiB each
//!
//! head     magic 8 | version 4 | slots 4 | nonce 16 | CRC 4 | zeros
//! entry    object 16 | chunk 4 | length 4 | hash 16 | generation 4 | flags 4 | CRC 4 | zeros 12
//! record   CRC 4 | opened 8 | length 8 | store | key | etag | version ID | last modified | zeros
//! ```
//!
//! Numbers are little-endian. A text is its length in two bytes, `ffff` for none, and its bytes.
//! The CRC of an entry or record also covers the nonce and its number, so that those of another
//! cache or slot don't count. A new nonce therefore empties the cache.

use crate::object::ObjectId;
use crate::store::Version;

/// Size of the head of `slots`.
pub(super) const HEAD_SIZE: usize = 4096;
/// Size of an entry in `slots`.
pub(super) const ENTRY_SIZE: usize = 64;
/// Size of a record in `objects`.
pub(super) const RECORD_SIZE: usize = 2048;
/// Version of the format.
pub(super) const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"objcache";
/// Flag of chunks that were fetched for a sequential reader.
const SEQUENTIAL: u32 = 1;
/// Length of a text that is missing.
const NO_TEXT: u16 = u16::MAX;

/// Random number of a cache.
pub(super) type Nonce = [u8; 16];

/// Head of `slots`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) slots: u32,
    pub(super) nonce: Nonce,
}

/// Identifies a chunk on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DiskKey {
    pub(super) object: ObjectId,
    pub(super) chunk: u32,
}

/// Description of the chunk in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: DiskKey,
    /// Number of bytes, at least 1.
    pub(super) length: u32,
    pub(super) hash: [u8; 16],
    /// Number of the write: later ones are larger.
    pub(super) generation: u32,
    /// True if the chunk was fetched for a sequential reader.
    pub(super) is_sequential: bool,
}

/// Version of an object when it was last opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Label of the store.
    pub(super) store: String,
    pub(super) key: String,
    pub(super) version: Version,
    /// Time of the last opening, in seconds since 1970.
    pub(super) opened: u64,
}

impl DiskKey {
    /// Returns the key of a chunk; `None` if the number is too large for the format.
    pub(crate) fn new(object: ObjectId, number: u64) -> Option<Self> {
        Some(Self { object, chunk: u32::try_from(number).ok()? })
    }
}

/// Returns the hash of a chunk's bytes.
pub(super) fn hash(bytes: &[u8]) -> [u8; 16] {
    let mut hash = [0; 16];
    blake3::Hasher::new().update(bytes).finalize_xof().fill(&mut hash);
    hash
}

impl Head {
    /// Returns the encoded head.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.slots.to_le_bytes());
        bytes.extend_from_slice(&self.nonce);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes.resize(HEAD_SIZE, 0);
        bytes
    }

    /// Parses a head; `None` if it is foreign, damaged, or of another version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = Input(bytes);
        let (magic, version) = (input.array()?, input.u32()?);
        let head = Self { slots: input.u32()?, nonce: input.array()? };
        let crc = crc32fast::hash(bytes.get(..32)?);
        (magic == MAGIC && version == VERSION && input.u32()? == crc).then_some(head)
    }
}

impl Entry {
    /// Returns the encoded entry of a slot.
    pub(super) fn encode(&self, nonce: &Nonce, slot: u32) -> [u8; ENTRY_SIZE] {
        let mut output = Vec::with_capacity(ENTRY_SIZE);
        output.extend_from_slice(self.key.object.as_bytes());
        output.extend_from_slice(&self.key.chunk.to_le_bytes());
        output.extend_from_slice(&self.length.to_le_bytes());
        output.extend_from_slice(&self.hash);
        output.extend_from_slice(&self.generation.to_le_bytes());
        output.extend_from_slice(&u32::from(self.is_sequential).to_le_bytes());
        output.extend_from_slice(&crc(nonce, slot, &output).to_le_bytes());
        let mut bytes = [0; ENTRY_SIZE];
        bytes.iter_mut().zip(output).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Parses the entry of a slot; `None` if the slot is free, or the entry damaged.
    pub(super) fn decode(bytes: &[u8], nonce: &Nonce, slot: u32) -> Option<Self> {
        let mut input = Input(bytes);
        let object = ObjectId::from_bytes(input.array()?);
        let key = DiskKey { object, chunk: input.u32()? };
        let (length, hash) = (input.u32()?, input.array()?);
        let (generation, flags) = (input.u32()?, input.u32()?);
        let is_sequential = flags & SEQUENTIAL != 0;
        if length == 0 || input.u32()? != crc(nonce, slot, bytes.get(..48)?) {
            return None;
        }
        Some(Self { key, length, hash, generation, is_sequential })
    }
}

impl Record {
    /// Returns the encoded record; `None` if it is too long.
    pub(super) fn encode(&self, nonce: &Nonce, number: u32) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&self.opened.to_le_bytes());
        bytes.extend_from_slice(&self.version.length.to_le_bytes());
        let Version { etag, version_id, last_modified, .. } = &self.version;
        let texts = [Some(&self.store), Some(&self.key)].into_iter();
        for text in texts.chain([etag, version_id, last_modified].map(Option::as_ref)) {
            let length = text.map_or(Ok(NO_TEXT), |text| u16::try_from(text.len())).ok()?;
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(text.map_or(&[][..], |text| text.as_bytes()));
        }
        if bytes.len() > RECORD_SIZE {
            return None;
        }
        bytes.resize(RECORD_SIZE, 0);
        let (place, covered) = bytes.split_first_chunk_mut()?;
        *place = crc(nonce, number, covered).to_le_bytes();
        Some(bytes)
    }

    /// Parses a record; `None` if there is none, or it is damaged.
    pub(super) fn decode(bytes: &[u8], nonce: &Nonce, number: u32) -> Option<Self> {
        let bytes = bytes.get(..RECORD_SIZE)?;
        let mut input = Input(bytes);
        if input.u32()? != crc(nonce, number, input.0) {
            return None;
        }
        let (opened, length) = (input.u64()?, input.u64()?);
        let (store, key) = (input.text()??, input.text()??);
        let (etag, version_id) = (input.text()?, input.text()?);
        let version = Version { length, etag, version_id, last_modified: input.text()? };
        Some(Self { store, key, version, opened })
    }
}

fn crc(nonce: &Nonce, number: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(nonce);
    hasher.update(&number.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

/// Bytes that haven't been parsed yet.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Parses a text, which may be missing.
    fn text(&mut self) -> Option<Option<String>> {
        let length = self.array().map(u16::from_le_bytes)?;
        if length == NO_TEXT {
            return Some(None);
        }
        let (text, rest) = self.0.split_at_checked(length.into())?;
        self.0 = rest;
        Some(Some(std::str::from_utf8(text).ok()?.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONCE: Nonce = [7; 16];

    fn entries() -> impl Strategy<Value = Entry> {
        let fields = (any::<[u8; 16]>(), any::<u32>(), 1_u32.., any::<[u8; 16]>(), any::<u32>());
        (fields, any::<bool>()).prop_map(
            |((id, chunk, length, hash, generation), is_sequential)| {
                let key = DiskKey { object: ObjectId::from_bytes(id), chunk };
                Entry { key, length, hash, generation, is_sequential }
            },
        )
    }

    fn records() -> impl Strategy<Value = Record> {
        let text = || prop::option::of(".{0,40}");
        let version = (any::<u64>(), text(), text(), text());
        let version = version.prop_map(|(length, etag, version_id, last_modified)| Version {
            length,
            etag,
            version_id,
            last_modified,
        });
        (".{0,60}", ".{0,200}", version, any::<u64>())
            .prop_map(|(store, key, version, opened)| Record { store, key, version, opened })
    }

    proptest! {
        #[test]
        fn heads_survive_a_round_trip(slots: u32, nonce: Nonce, bit in 0_usize..36 * 8) {
            let head = Head { slots, nonce };
            let mut bytes = head.encode();
            prop_assert_eq!(bytes.len(), HEAD_SIZE);
            prop_assert_eq!(Head::decode(&bytes), Some(head));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Head::decode(&bytes), None);
        }

        #[test]
        fn entries_survive_a_round_trip(entry in entries(), slot: u32, bit in 0_usize..52 * 8) {
            let mut bytes = entry.encode(&NONCE, slot);
            prop_assert_eq!(Entry::decode(&bytes, &NONCE, slot), Some(entry));
            prop_assert_eq!(Entry::decode(&bytes, &[8; 16], slot), None);
            prop_assert_eq!(Entry::decode(&bytes, &NONCE, slot ^ 1), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Entry::decode(&bytes, &NONCE, slot), None);
        }

        #[test]
        fn records_survive_a_round_trip(record in records(), bit in 0_usize..RECORD_SIZE * 8) {
            let mut bytes = record.encode(&NONCE, 5).unwrap();
            prop_assert_eq!(bytes.len(), RECORD_SIZE);
            prop_assert_eq!(Record::decode(&bytes, &NONCE, 5), Some(record));
            prop_assert_eq!(Record::decode(&bytes, &NONCE, 6), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode(&bytes, &NONCE, 5), None);
        }

        #[test]
        fn arbitrary_bytes_are_not_accepted(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            prop_assert_eq!(Head::decode(&bytes), None);
            prop_assert_eq!(Entry::decode(&bytes, &NONCE, 0), None);
            prop_assert_eq!(Record::decode(&bytes, &NONCE, 0), None);
        }
    }

    #[test]
    fn free_slots_and_long_records_are_not_encoded() {
        assert_eq!(Entry::decode(&[0; ENTRY_SIZE], &NONCE, 0), None);
        let version = Version { length: 1, etag: None, version_id: None, last_modified: None };
        let long = Record { store: String::new(), key: "k".repeat(2048), version, opened: 0 };
        assert_eq!(long.encode(&NONCE, 0), None);
    }
}
