//! Metadata of an archive: a manifest of files, the description of a converted tar archive, or
//! anything else that the packer wrote.
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

/// Maximum length of metadata that is parsed, in bytes: a manifest of some 600,000 files. A single
/// name may be as long as all of it, and is held in memory.
pub const MAX_METADATA: u32 = 64 * 1024 * 1024;
/// Number of bytes that are read at a time.
const BUFFER_LEN: usize = 64 * 1024;

/// A file of a packed directory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PackedFile {
    /// Path of the file, as the packer wrote it.
    pub path: String,
    /// Length of the file, in bytes.
    pub size: u64,
}

/// Kind of the main stream according to the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamOrigin {
    /// The stream is a packed directory: the files' contents one after another.
    Manifest,
    /// The stream was converted from a tar archive: the files' contents one after another,
    /// `total_bytes` in all. The index states the length of the tar archive instead.
    Tar {
        /// Sum of the files' lengths, in bytes.
        total_bytes: u64,
    },
    /// The stream is a disk.
    Other,
}

impl StreamOrigin {
    /// Classification of metadata that is too long to be parsed. Nothing else is as long as a large
    /// manifest, and a manifest must not be served as a disk.
    pub(super) const TOO_LONG: Self = Self::Manifest;
}

/// Classifies metadata. Unrecognized metadata belongs to a disk.
///
/// # Errors
/// The metadata can't be read.
pub(super) fn classify(metadata: impl Read) -> io::Result<StreamOrigin> {
    // The first file identifies a manifest, so parsing stops there.
    let mut is_manifest = false;
    let mut found = ScanResult::default();
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
        _ if is_manifest || is_empty_manifest => StreamOrigin::Manifest,
        Some(total_bytes) if is_whole => StreamOrigin::Tar { total_bytes },
        _ => StreamOrigin::Other,
    })
}

/// Returns a buffered reader of the bytes at `place`.
pub(super) fn reader(storage: &dyn Storage, place: Extent) -> impl Read {
    BufReader::with_capacity(
        BUFFER_LEN,
        ExtentReader { storage, at: place.offset, left: place.length },
    )
}

/// Returns true if reading failed, as opposed to parsing.
fn is_failure(error: &serde_json::Error) -> bool {
    error.io_error_kind().is_some_and(|kind| kind != io::ErrorKind::UnexpectedEof)
}

/// Calls `each` for every file of the manifest at `place`.
///
/// # Errors
/// The metadata can't be read, or isn't a manifest.
pub(super) fn for_each_file(
    storage: &dyn Storage,
    place: Extent,
    each: &mut dyn FnMut(PackedFile),
) -> Result<(), serde_json::Error> {
    let mut found = ScanResult::default();
    parse(reader(storage, place), &mut found, &mut |file| {
        each(file);
        true
    })?;
    if found.has_files { Ok(()) } else { Err(serde_json::Error::missing_field("files")) }
}

/// Content of the metadata other than the files.
#[derive(Debug, Default)]
struct ScanResult {
    has_files: bool,
    tar_bytes: Option<u64>,
}

/// Parses metadata as a stream, with one file in memory at a time. If `each` returns false, parsing
/// stops with an error.
fn parse(
    bytes: impl Read,
    found: &mut ScanResult,
    each: &mut dyn FnMut(PackedFile) -> bool,
) -> Result<(), serde_json::Error> {
    let mut json = serde_json::Deserializer::from_reader(bytes);
    MetadataVisitor { found, each }.deserialize(&mut json)?;
    json.end()
}

/// Reader of a range of an archive.
struct ExtentReader<'a> {
    storage: &'a dyn Storage,
    at: u64,
    left: u32,
}

impl Read for ExtentReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left as usize);
        let part = buffer.get_mut(..count).unwrap_or_default();
        self.storage.read_exact_at(part, self.at)?;
        self.at += count as u64;
        self.left = self.left.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        Ok(count)
    }
}

/// Visitor of the outermost object.
struct MetadataVisitor<'a> {
    found: &'a mut ScanResult,
    each: &'a mut dyn FnMut(PackedFile) -> bool,
}

impl<'de> DeserializeSeed<'de> for MetadataVisitor<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "files" => {
                    map.next_value_seed(FilesVisitor(&mut *self.each))?;
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

/// Visitor of the list of files.
struct FilesVisitor<'a>(&'a mut dyn FnMut(PackedFile) -> bool);

impl<'de> DeserializeSeed<'de> for FilesVisitor<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for FilesVisitor<'_> {
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

/// Source of a stream, as recorded by `hexz convert`. Other fields are skipped.
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

    fn classified(json: &str) -> StreamOrigin {
        classify(json.as_bytes()).unwrap()
    }

    #[test]
    fn metadata_is_classified_by_content() {
        let file = r#"{"path":"a","offset":0,"size":1,"mode":33188,"mtime":0}"#;
        for manifest in [r#"{"files":[]}"#, &format!(r#"{{"files":[{file},{file}]}}"#)] {
            assert_eq!(classified(manifest), StreamOrigin::Manifest, "{manifest}");
        }
        // A manifest that is damaged behind its first file is still a manifest.
        assert_eq!(classified(&format!(r#"{{"files":[{file},"#)), StreamOrigin::Manifest);
        let tar = r#"{"source":{"format":"tar","source_files":[{"name":"a"}],"total_bytes":7}}"#;
        assert_eq!(classified(tar), StreamOrigin::Tar { total_bytes: 7 });
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
            assert_eq!(classified(other), StreamOrigin::Other, "{other}");
        }
    }
}
