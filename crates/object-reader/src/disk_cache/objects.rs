//! Records of the versions that objects had when they were last opened.

use std::collections::HashMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use super::RECORDS;
use super::file::Files;
use super::format::Record;
use crate::store::Version;

/// Numbers of the records by object. Takes about 200 KiB when all are in use.
#[derive(Debug, Default)]
pub(super) struct Objects {
    by_name: HashMap<[u8; 16], Place>,
}

/// Number of a record, and its time.
#[derive(Debug, Clone, Copy)]
struct Place {
    number: u32,
    opened: u64,
}

impl Objects {
    /// Reads all records. Damaged ones are free.
    pub(super) fn load(files: &Files) -> io::Result<Self> {
        let mut objects = Self::default();
        for (number, record) in files.records()? {
            let place = Place { number, opened: record.opened };
            let known = objects.by_name.entry(hash(&record.store, &record.key)).or_insert(place);
            if known.opened < place.opened {
                *known = place;
            }
        }
        Ok(objects)
    }

    /// Returns the memory in use, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.by_name.capacity() * (size_of::<([u8; 16], Place)>() + 1)
    }

    /// Returns the number of the record of an object.
    pub(super) fn find(&self, store: &str, key: &str) -> Option<u32> {
        Some(self.by_name.get(&hash(store, key))?.number)
    }

    /// Returns the number of the record for an object: its own, a free one, or the oldest one.
    pub(super) fn assign(&mut self, store: &str, key: &str, opened: u64) -> u32 {
        let name = hash(store, key);
        if let Some(place) = self.by_name.get_mut(&name) {
            place.opened = opened;
            return place.number;
        }
        let oldest = self.by_name.iter().min_by_key(|(_, place)| place.opened);
        let oldest = oldest.map(|(name, place)| (*name, place.number));
        let number = match oldest {
            Some((oldest, number))
                if self.by_name.len() >= usize::try_from(RECORDS).unwrap_or(0) =>
            {
                self.by_name.remove(&oldest);
                number
            }
            _ => self.first_free(),
        };
        self.by_name.insert(name, Place { number, opened });
        number
    }

    fn first_free(&self) -> u32 {
        let mut used: Vec<_> = self.by_name.values().map(|place| place.number).collect();
        used.sort_unstable();
        (0..)
            .zip(used)
            .find(|(free, used)| free != used)
            .map_or_else(|| u32::try_from(self.by_name.len()).unwrap_or(RECORDS), |(free, _)| free)
    }
}

/// Creates a record of the present time.
pub(super) fn record(store: &str, key: &str, version: &Version) -> Record {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Record {
        store: store.to_owned(),
        key: key.to_owned(),
        version: version.clone(),
        opened: since.as_secs(),
    }
}

fn hash(store: &str, key: &str) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(store.len() as u64).to_le_bytes()).update(store.as_bytes());
    let mut hash = [0; 16];
    hasher.update(key.as_bytes()).finalize_xof().fill(&mut hash);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_oldest_record_is_replaced_when_all_are_in_use() {
        let mut objects = Objects::default();
        let mut numbers = BTreeSet::new();
        for n in 0..RECORDS {
            numbers.insert(objects.assign("store", &n.to_string(), u64::from(n) + 10));
        }
        assert_eq!(numbers, (0..RECORDS).collect());
        let first = objects.find("store", "0").unwrap();
        assert_eq!(objects.assign("store", "0", 1 << 40), first);
        let second = objects.find("store", "1").unwrap();
        assert_eq!(objects.assign("store", "new", 1 << 40), second);
        assert_eq!(objects.find("store", "1"), None);
        assert_eq!(objects.find("stor", "e1"), None);
    }
}
