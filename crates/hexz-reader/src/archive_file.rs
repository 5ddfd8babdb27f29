//! The file of an archive: reads parts of it, with errors that name the file.

use std::path::Path;
use std::sync::Arc;

use super::error::{Error, ErrorKind};
use super::header::{Extent, HEADER_REGION, Header, HeaderRegion};
use super::layout::{EntryForm, PAGE_HEADER_LEN};
use super::limits::MAX_MASTER_INDEX;
use super::metadata::{self, MAX_METADATA, StreamOrigin};
use crate::storage::Storage;

/// Path and bytes of an archive.
#[derive(Debug)]
pub(super) struct ArchiveFile {
    pub(super) path: Arc<Path>,
    pub(super) storage: Arc<dyn Storage>,
}

impl ArchiveFile {
    /// Attributes a problem to this file.
    pub(super) fn error(&self, kind: ErrorKind) -> Error {
        Error { path: Arc::clone(&self.path), offset: None, kind }
    }

    /// Attributes a problem to the byte `offset` of this file.
    pub(super) fn error_at(&self, kind: ErrorKind, offset: u64) -> Error {
        Error { offset: Some(offset), ..self.error(kind) }
    }

    /// Fills `buffer` with the bytes from `offset` on; `purpose` completes "can't …".
    pub(super) fn read_exact_at(
        &self,
        buffer: &mut [u8],
        offset: u64,
        purpose: &'static str,
    ) -> Result<(), Error> {
        self.storage
            .read_exact_at(buffer, offset)
            .map_err(|error| self.error_at(ErrorKind::from_read_error(purpose, error), offset))
    }

    /// Reads the bytes at `place`, whose length was checked against its limit during parsing.
    pub(super) fn read(&self, place: Extent, purpose: &'static str) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; place.length as usize];
        self.read_exact_at(&mut bytes, place.offset, purpose)?;
        Ok(bytes)
    }

    /// Reads and parses the header.
    pub(super) fn header(&self) -> Result<Header, Error> {
        let length = self.storage.length();
        let mut region: Box<HeaderRegion> = Box::new([0; HEADER_REGION]);
        // If the file is shorter than a header, its start may still identify another file type.
        let present = usize::try_from(length).map_or(HEADER_REGION, |it| it.min(HEADER_REGION));
        let part = region.get_mut(..present).unwrap_or_default();
        self.read_exact_at(part, 0, "read the header")?;
        if part.len() < HEADER_REGION && part.starts_with(b"HEXZ") {
            return Err(self.error(ErrorKind::Truncated("the header")));
        }
        Header::parse(&region, length).map_err(|kind| self.error(kind))
    }

    /// Reads the master index without parsing it: its signature is verified first.
    pub(super) fn master_index(&self, header: &Header) -> Result<Vec<u8>, Error> {
        let offset = header.index_offset;
        let (got, limit) = (header.index_end - offset, MAX_MASTER_INDEX);
        match u32::try_from(got) {
            Ok(length) if got <= limit => {
                self.read(Extent { offset, length }, "read the master index")
            }
            _ => {
                let what = "the length of the master index in bytes";
                Err(self.error_at(ErrorKind::TooLarge { what, got, limit }, offset))
            }
        }
    }

    /// Determines the form of the entries from the archive's first page, at `place`.
    pub(super) fn entry_form(&self, place: Extent) -> Result<EntryForm, Error> {
        let head = Extent { length: PAGE_HEADER_LEN, ..place };
        let head = self.read(head, "read an index page")?;
        let count = head.first_chunk().map(|count| u64::from_le_bytes(*count)).unwrap_or_default();
        EntryForm::of_page(place.length, count).ok_or_else(|| {
            self.error_at(ErrorKind::Invalid("an index page's number of blocks"), place.offset)
        })
    }

    /// Classifies the main stream by the metadata, if there is any.
    pub(super) fn stream_origin(&self, header: &Header) -> Result<Option<StreamOrigin>, Error> {
        let Some(place) = header.metadata else { return Ok(None) };
        if place.length > MAX_METADATA {
            return Ok(Some(StreamOrigin::TOO_LONG));
        }
        metadata::classify(metadata::reader(self.storage.as_ref(), place))
            .map(Some)
            .map_err(|error| self.error(ErrorKind::from_read_error("read the metadata", error)))
    }

    /// Reads the bytes between master index and end of the metadata.
    pub(super) fn trailer(&self, header: &Header) -> Result<Trailer, Error> {
        let offset = header.index_end;
        let end = header.metadata.and_then(Extent::end).unwrap_or(offset);
        let length = u32::try_from(end.saturating_sub(offset)).unwrap_or(u32::MAX);
        let length = if length > MAX_METADATA { 0 } else { length };
        let bytes = self.read(Extent { offset, length }, "read the metadata")?;
        Ok(Trailer { offset, bytes })
    }
}

/// The bytes between master index and end of the metadata: metadata and replaced signatures. Empty
/// if they are longer than the metadata that can be parsed.
pub(super) struct Trailer {
    offset: u64,
    pub(super) bytes: Vec<u8>,
}

impl Trailer {
    /// Classifies the main stream by the metadata at `place`.
    pub(super) fn stream_origin(&self, place: Extent) -> StreamOrigin {
        let start = place.offset.checked_sub(self.offset);
        let range = start.and_then(|start| usize::try_from(start).ok());
        let bytes = range.and_then(|start| self.bytes.get(start..)?.get(..place.length as usize));
        // Reading from memory can't fail.
        bytes.and_then(|bytes| metadata::classify(bytes).ok()).unwrap_or(StreamOrigin::TOO_LONG)
    }
}
