//! The manifest of a packed directory: `{"files":[{"path":…,"size":…},…]}`, in JSON.

use std::fmt;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::snapshot::archive::Archive;
use crate::snapshot::error::{Error, Problem};
use crate::snapshot::header::Extent;
use crate::storage::Storage;

/// The longest manifest that is read, in bytes: some 600,000 files. A name in it may be as long
/// as all of it, and is held in memory.
pub const MAX_MANIFEST: u32 = 64 * 1024 * 1024;
/// What is read at once, in bytes.
const PIECE: usize = 64 * 1024;

/// A file of a packed directory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PackedFile {
    /// Its path, as the packer wrote it.
    pub path: String,
    /// Its length, in bytes.
    pub size: u64,
}

/// Hands each file of the manifest to `each`.
pub(super) fn read(
    archive: &Archive,
    place: Extent,
    each: &mut dyn FnMut(PackedFile),
) -> Result<(), Error> {
    let fail = |problem: Problem| problem.at(&Arc::clone(&archive.path), place.offset);
    if place.length > MAX_MANIFEST {
        return Err(fail(Problem::TooLarge {
            what: "the manifest's length in bytes",
            got: place.length.into(),
            limit: MAX_MANIFEST.into(),
        }));
    }
    let bytes = Bytes { storage: archive.storage(), at: place.offset, left: place.length };
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(PIECE, bytes));
    let read = Manifest(each).deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|error| {
        fail(match error.io_error_kind() {
            Some(kind) => Problem::Io("read the manifest", kind.into()),
            None => Problem::Invalid("the manifest of files"),
        })
    })
}

/// A range of an archive, from its beginning to its end.
struct Bytes<'a> {
    storage: &'a dyn Storage,
    at: u64,
    left: u32,
}

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left as usize);
        let part = buffer.get_mut(..count).unwrap_or_default();
        self.storage.read_exact_at(part, self.at)?;
        self.at += count as u64;
        self.left = self.left.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        Ok(count)
    }
}

/// The object, of which only the list is of interest.
struct Manifest<'a>(&'a mut dyn FnMut(PackedFile));

impl<'de> DeserializeSeed<'de> for Manifest<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Manifest<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a list of files")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_files = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "files" {
                has_files = true;
                map.next_value_seed(Files(&mut *self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if has_files { Ok(()) } else { Err(serde::de::Error::missing_field("files")) }
    }
}

/// The list, of which one file at a time is in memory.
struct Files<'a>(&'a mut dyn FnMut(PackedFile));

impl<'de> DeserializeSeed<'de> for Files<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Files<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of files")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(file) = list.next_element()? {
            (self.0)(file);
        }
        Ok(())
    }
}
