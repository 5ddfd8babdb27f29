//! Metadata of an archive: a manifest of files, a converted tar archive's description, or
//! whatever else its packer wrote.
//!
//! `hexz pack DIRECTORY` writes `{"files":[{"path":…,"size":…},…]}`, `hexz convert tar` writes
//! `{"source":{"format":"tar","total_bytes":…,"source_files":[…]}}`. Anything else (a commit
//! message, descriptions of tensors, arbitrary JSON) accompanies a disk.

use std::fmt;
use std::io::{self, BufReader, Read};

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::header::Extent;
use crate::storage::Storage;

/// The longest metadata that are parsed, in bytes: a manifest of some 600,000 files. A name in
/// it may be as long as all of it, and is held in memory.
pub const MAX_METADATA: u32 = 64 * 1024 * 1024;
/// Bytes that are read at once.
const PIECE: usize = 64 * 1024;

/// A file of a packed directory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PackedFile {
    /// Its path, as the packer wrote it.
    pub path: String,
    /// Its length, in bytes.
    pub size: u64,
}

/// What metadata say of the main stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Metadata {
    /// It is a packed directory: files one after another.
    Manifest,
    /// It was converted from a tar archive: files one after another, so many bytes, though
    /// the index states the length of the tar archive.
    Tar {
        /// Sum of the files' lengths, in bytes.
        total_bytes: u64,
    },
    /// It is a disk.
    Other,
}

impl Metadata {
    /// Of metadata that are too long to be parsed: nobody else writes as much, and a manifest
    /// must not be served as a disk.
    pub(super) const TOO_LONG: Self = Self::Manifest;
}

/// Classifies metadata. What isn't understood belongs to a disk.
///
/// # Errors
/// They can't be read.
pub(super) fn classify(metadata: impl Read) -> io::Result<Metadata> {
    // One file is enough to tell a manifest.
    let mut is_manifest = false;
    let mut found = Found::default();
    let parsed = parse(metadata, &mut found, &mut |_| {
        is_manifest = true;
        false
    });
    let is_whole = match parsed {
        Ok(()) => true,
        Err(error) if is_failure(&error) => return Err(error.into()),
        Err(_) => false,
    };
    let is_empty_manifest = is_whole && found.has_files;
    Ok(match found.tar_bytes {
        _ if is_manifest || is_empty_manifest => Metadata::Manifest,
        Some(total_bytes) if is_whole => Metadata::Tar { total_bytes },
        _ => Metadata::Other,
    })
}

/// The bytes at `place`, read in pieces.
pub(super) fn reader(storage: &dyn Storage, place: Extent) -> impl Read {
    BufReader::with_capacity(PIECE, Bytes { storage, at: place.offset, left: place.length })
}

/// Returns true if the bytes couldn't be read, and not merely parsed.
fn is_failure(error: &serde_json::Error) -> bool {
    error.io_error_kind().is_some_and(|kind| kind != io::ErrorKind::UnexpectedEof)
}

/// Hands each file of the manifest at `place` to `each`.
///
/// # Errors
/// It can't be read, or is no manifest.
pub(super) fn files(
    storage: &dyn Storage,
    place: Extent,
    each: &mut dyn FnMut(PackedFile),
) -> Result<(), serde_json::Error> {
    let mut found = Found::default();
    parse(reader(storage, place), &mut found, &mut |file| {
        each(file);
        true
    })?;
    if found.has_files { Ok(()) } else { Err(serde_json::Error::missing_field("files")) }
}

/// What was met besides files.
#[derive(Debug, Default)]
struct Found {
    has_files: bool,
    tar_bytes: Option<u64>,
}

/// Parses metadata in pieces, one file in memory at a time. `each` returns false to stop,
/// which is an error then.
fn parse(
    bytes: impl Read,
    found: &mut Found,
    each: &mut dyn FnMut(PackedFile) -> bool,
) -> Result<(), serde_json::Error> {
    let mut json = serde_json::Deserializer::from_reader(bytes);
    Object { found, each }.deserialize(&mut json)?;
    json.end()
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

/// The outermost object.
struct Object<'a> {
    found: &'a mut Found,
    each: &'a mut dyn FnMut(PackedFile) -> bool,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "files" => {
                    map.next_value_seed(Files(&mut *self.each))?;
                    self.found.has_files = true;
                }
                "source" => self.found.tar_bytes = map.next_value::<Source>()?.tar_bytes(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

/// The list of files.
struct Files<'a>(&'a mut dyn FnMut(PackedFile) -> bool);

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
            if !(self.0)(file) {
                return Err(A::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

/// What `hexz convert` says of where a stream comes from. Other fields are skipped.
#[derive(Deserialize)]
struct Source {
    format: String,
    total_bytes: u64,
}

impl Source {
    fn tar_bytes(self) -> Option<u64> {
        (self.format == "tar").then_some(self.total_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(json: &str) -> Metadata {
        classify(json.as_bytes()).unwrap()
    }

    #[test]
    fn metadata_are_told_apart_by_their_content() {
        let file = r#"{"path":"a","offset":0,"size":1,"mode":33188,"mtime":0}"#;
        for manifest in [r#"{"files":[]}"#, &format!(r#"{{"files":[{file},{file}]}}"#)] {
            assert_eq!(classified(manifest), Metadata::Manifest, "{manifest}");
        }
        // Damaged behind the first file, it is a manifest all the same.
        assert_eq!(classified(&format!(r#"{{"files":[{file},"#)), Metadata::Manifest);
        let tar = r#"{"source":{"format":"tar","source_files":[{"name":"a"}],"total_bytes":7}}"#;
        assert_eq!(classified(tar), Metadata::Tar { total_bytes: 7 });
        for other in [
            "",
            "a commit message",
            "[1,2]",
            r#"{"message":"a commit"}"#,
            r#"{"files":["a","b"]}"#,
            r#"{"files":3}"#,
            r#"{"source":{"format":"zip","total_bytes":7}}"#,
            r#"{"source":{"format":"tar","total_bytes":7}"#,
            r#"{"tensors":[{"name":"w","shape":[2,3]}]}"#,
        ] {
            assert_eq!(classified(other), Metadata::Other, "{other}");
        }
    }
}
