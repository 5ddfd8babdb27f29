//! Parser of the header in the first 4096 bytes of an archive.

use super::error::ErrorKind;
use super::fields::FieldReader;
use super::limits::{MAX_DICTIONARY, MAX_KDF_ITERATIONS};

/// Length of the region reserved for the header, in bytes. Unused bytes are zero.
pub(super) const HEADER_REGION: usize = 4096;
/// Content of that region.
pub(super) type HeaderRegion = [u8; HEADER_REGION];
/// Length of that region as a file offset: everything else is stored behind it.
pub(super) const HEADER_SIZE: u64 = HEADER_REGION as u64;

/// First bytes of every archive.
const MAGIC: &[u8; 4] = b"HEXZ";

/// Compression method of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// LZ4 blocks.
    Lz4,
    /// Zstandard frames.
    Zstd,
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lz4 => "LZ4",
            Self::Zstd => "Zstandard",
        })
    }
}

/// Parameters for deriving the key of an encrypted archive from a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyDerivation {
    pub(super) salt: [u8; 16],
    pub(super) iterations: u32,
}

/// Parameters of content-defined chunking, which cuts blocks by a rolling hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// Binary logarithm of the average length that the packer aimed at.
    pub average_bits: u32,
    /// Minimum length, in bytes.
    pub smallest: u32,
    /// Maximum length, in bytes.
    pub largest: u32,
}

/// A range of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Extent {
    pub(super) fn end(self) -> Option<u64> {
        self.offset.checked_add(self.length.into())
    }
}

/// Form of the field that names parents. All other header fields are the same in every published
/// version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParentsField {
    /// `Option<String>`, as Hexz 0.1 to 0.5.1 write it.
    Optional,
    /// `Vec<String>`, as later versions write it.
    List,
}

/// A parsed header, whose offsets have been checked to lie within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) parents_field: ParentsField,
    pub(super) block_size: u32,
    pub(super) index_offset: u64,
    /// Upper bound of the end of the master index.
    pub(super) index_end: u64,
    pub(super) parent_paths: Vec<String>,
    pub(super) dictionary: Option<Extent>,
    pub(super) metadata: Option<Extent>,
    pub(super) signature: Option<Extent>,
    pub(super) encryption: Option<KeyDerivation>,
    pub(super) compression: Compression,
    /// True if the packer set the flag for blocks of different lengths.
    pub(super) has_variable_blocks: bool,
    pub(super) chunking: Option<Chunking>,
}

/// Returns the names of the parents of an archive of `length` bytes, by the first 4096 of them. A
/// name is whatever the packer has recorded, such as a path.
///
/// # Errors
/// The archive has no valid header.
pub fn parent_names(start: &[u8], length: u64) -> Result<Vec<String>, ErrorKind> {
    if !start.starts_with(MAGIC) {
        return Err(ErrorKind::NotHexz);
    }
    let region = start.first_chunk().ok_or(ErrorKind::Truncated("the header"))?;
    Ok(Header::parse(region, length)?.parent_paths)
}

impl Header {
    /// Parses the header region of a file of `file_length` bytes.
    ///
    /// Both forms have version number 1, so the form that fits is used. No header fits both with
    /// different meanings: padding, flags and lengths of one form contradict the other. If neither
    /// fits, the error is that of the form that the header resembles.
    pub(super) fn parse(region: &HeaderRegion, file_length: u64) -> Result<Self, ErrorKind> {
        let forms = [ParentsField::List, ParentsField::Optional];
        let mut malformed = None;
        let mut inconsistent = None;
        for form in forms {
            match Self::parse_as(form, region) {
                Ok(header) => match header.check(file_length) {
                    Ok(header) => return Ok(header),
                    Err(kind) => inconsistent = inconsistent.or(Some(kind)),
                },
                Err(kind) => malformed = malformed.or(Some(kind)),
            }
        }
        Err(inconsistent.or(malformed).unwrap_or(ErrorKind::NotHexz))
    }

    /// Parses the fields without checking that offsets lie within the file.
    fn parse_as(parents_field: ParentsField, region: &HeaderRegion) -> Result<Self, ErrorKind> {
        let mut fields = FieldReader::new(region);
        if &fields.array::<4>("the magic number")? != MAGIC {
            return Err(ErrorKind::NotHexz);
        }
        let version = fields.u32("the version")?;
        if version != 1 {
            return Err(ErrorKind::UnknownVersion(version));
        }
        let block_size = fields.u32("the block size")?;
        let index_offset = fields.u64("the index offset")?;
        let parent_paths = match parents_field {
            ParentsField::List => parent_list(&mut fields)?,
            ParentsField::Optional => {
                fields.option("the parent flag", parent_path)?.into_iter().collect()
            }
        };
        let dictionary = extent(&mut fields, "the dictionary's location")?;
        let metadata = extent(&mut fields, "the metadata's location")?;
        let signature = extent(&mut fields, "the signature's location")?;
        let encryption = fields.option("the encryption flag", |fields| {
            Ok(KeyDerivation {
                salt: fields.array("the salt")?,
                iterations: fields.u32("the iteration count")?,
            })
        })?;
        let compression = match fields.u32("the compression")? {
            0 => Compression::Lz4,
            1 => Compression::Zstd,
            _ => return Err(ErrorKind::Invalid("the compression")),
        };
        for stream in ["the main flag", "the auxiliary flag"] {
            fields.bool(stream)?;
        }
        let has_variable_blocks = fields.bool("the variable-blocks flag")?;
        let chunking = fields.option("the chunking flag", |fields| {
            Ok(Chunking {
                average_bits: fields.u32("the chunking")?,
                smallest: fields.u32("the chunking")?,
                largest: fields.u32("the chunking")?,
            })
        })?;
        // Chunking parameters are never zero, so the flag was set by damage. It must not be
        // ignored, since it determines the meaning of references to parents.
        if chunking.is_some_and(|Chunking { average_bits, smallest, largest }| {
            average_bits == 0 || smallest == 0 || largest == 0
        }) {
            return Err(ErrorKind::Invalid("the chunking"));
        }
        // No version that writes the older form writes chunking parameters.
        if parents_field == ParentsField::Optional && chunking.is_some() {
            return Err(ErrorKind::Invalid("the chunking flag"));
        }
        if fields.rest().iter().any(|&byte| byte != 0) {
            return Err(ErrorKind::Invalid("the header's padding"));
        }
        Ok(Self {
            parents_field,
            block_size,
            index_offset,
            index_end: 0,
            parent_paths,
            dictionary,
            metadata,
            signature,
            encryption,
            compression,
            has_variable_blocks,
            chunking,
        })
    }

    /// Checks limits, and that all offsets lie within the file.
    fn check(mut self, file_length: u64) -> Result<Self, ErrorKind> {
        if let Some(KeyDerivation { iterations, .. }) = self.encryption {
            check_iterations(iterations)?;
        }
        if let Some(dictionary) = self.dictionary {
            check_dictionary(dictionary, self.index_offset)?;
        }
        if !(HEADER_SIZE..file_length).contains(&self.index_offset) {
            return Err(ErrorKind::Truncated("the part before the master index"));
        }
        // Metadata and signature follow the master index; the first of them ends it.
        self.index_end = file_length;
        for behind in [self.metadata, self.signature].into_iter().flatten() {
            let end = behind.end().ok_or(ErrorKind::Invalid("the metadata's location"))?;
            if end > file_length {
                return Err(ErrorKind::Truncated("the metadata or signature"));
            }
            if behind.offset < self.index_offset {
                return Err(ErrorKind::Invalid("the metadata's location"));
            }
            self.index_end = self.index_end.min(behind.offset);
        }
        Ok(self)
    }
}

fn parent_list(fields: &mut FieldReader<'_>) -> Result<Vec<String>, ErrorKind> {
    let count = fields.u64("the number of parents")?;
    // Each parent takes at least its own length field, so the region limits their number.
    if count > (fields.left() / 8) as u64 {
        return Err(ErrorKind::Invalid("the number of parents"));
    }
    (0..count).map(|_| parent_path(fields)).collect()
}

fn parent_path(fields: &mut FieldReader<'_>) -> Result<String, ErrorKind> {
    let path = fields.string("a parent's path")?;
    if path.is_empty() || path.contains('\0') {
        return Err(ErrorKind::Invalid("a parent's path"));
    }
    Ok(path)
}

/// Parses two consecutive options, an offset and a length, which must be both present or both
/// missing.
fn extent(fields: &mut FieldReader<'_>, what: &'static str) -> Result<Option<Extent>, ErrorKind> {
    let offset = fields.option(what, |fields| fields.u64(what))?;
    let length = fields.option(what, |fields| fields.u32(what))?;
    match (offset, length) {
        (Some(offset), Some(length)) => Ok(Some(Extent { offset, length })),
        (None, None) => Ok(None),
        _ => Err(ErrorKind::Invalid(what)),
    }
}

fn check_iterations(iterations: u32) -> Result<(), ErrorKind> {
    match iterations {
        0 => Err(ErrorKind::Invalid("the iteration count")),
        1..=MAX_KDF_ITERATIONS => Ok(()),
        more => Err(ErrorKind::TooLarge {
            what: "the number of key derivation iterations",
            got: more.into(),
            limit: MAX_KDF_ITERATIONS.into(),
        }),
    }
}

fn check_dictionary(dictionary: Extent, index_offset: u64) -> Result<(), ErrorKind> {
    if dictionary.length > MAX_DICTIONARY {
        return Err(ErrorKind::TooLarge {
            what: "the length of the dictionary in bytes",
            got: dictionary.length.into(),
            limit: MAX_DICTIONARY.into(),
        });
    }
    match dictionary.end() {
        Some(end) if dictionary.offset >= HEADER_SIZE && end <= index_offset => Ok(()),
        _ => Err(ErrorKind::Invalid("the dictionary's location")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(bytes: &[u8]) -> [u8; 4096] {
        let mut region = [0; 4096];
        region[..bytes.len()].copy_from_slice(bytes);
        region
    }

    /// Returns the smallest header: LZ4, a main stream, index at 4096.
    fn golden() -> Vec<u8> {
        let mut bytes = b"HEXZ\x01\0\0\0\0\x10\0\0\0\x10\0\0\0\0\0\0".to_vec();
        bytes.extend([0; 8]); // no parents
        bytes.extend([0; 7]); // no dictionary, metadata, signature, encryption
        bytes.extend([0; 4]); // LZ4
        bytes.extend([1, 0, 0]); // main stream only
        bytes.push(0); // no chunking
        bytes
    }

    #[test]
    fn smallest_header_is_parsed() {
        let header = Header::parse(&region(&golden()), 5000).unwrap();
        assert_eq!(header.block_size, 4096);
        assert_eq!((header.index_offset, header.index_end), (4096, 5000));
        assert_eq!(header.compression, Compression::Lz4);
        assert_eq!(header.encryption, None);
        assert!(!header.has_variable_blocks && header.chunking.is_none());
        assert_eq!(header.parents_field, ParentsField::List);
    }

    #[test]
    fn parents_are_named_by_the_start_of_an_archive() {
        let mut start = region(&golden_before_lists(Some("base.hxz"))).to_vec();
        start.extend([1; 100]);
        assert_eq!(parent_names(&start, 5000).unwrap(), ["base.hxz"]);
        assert_eq!(parent_names(b"HEXZ", 4).unwrap_err().label(), "truncated");
        assert_eq!(parent_names(b"<html>", 6).unwrap_err().label(), "not_hexz");
    }

    /// Returns the smallest header in the older form, without a list of parents.
    fn golden_before_lists(parent: Option<&str>) -> Vec<u8> {
        let mut bytes = golden()[..20].to_vec();
        match parent {
            None => bytes.push(0),
            Some(path) => {
                bytes.push(1);
                bytes.extend((path.len() as u64).to_le_bytes());
                bytes.extend(path.as_bytes());
            }
        }
        bytes.extend(&golden()[28..]);
        bytes
    }

    #[test]
    fn older_headers_are_detected_by_the_parents_field() {
        for parent in [None, Some("b"), Some("base.hxz"), Some("/srv/images/base.hxz")] {
            let header = Header::parse(&region(&golden_before_lists(parent)), 5000).unwrap();
            assert_eq!(header.parents_field, ParentsField::Optional);
            assert_eq!(header.parent_paths, Vec::from_iter(parent));
            assert_eq!(header.compression, Compression::Lz4);
        }
        // An empty archive reads the same in both forms.
        let mut empty = golden_before_lists(None);
        let features = empty.len() - 4;
        empty[features] = 0;
        let header = Header::parse(&region(&empty), 5000).unwrap();
        assert_eq!((header.compression, header.parent_paths.len()), (Compression::Lz4, 0));
    }

    #[test]
    fn errors_refer_to_the_matching_form() {
        // The file ends before the master index.
        for bytes in [golden(), golden_before_lists(Some("base.hxz"))] {
            let error = Header::parse(&region(&bytes), 4096).unwrap_err();
            assert!(matches!(error, ErrorKind::Truncated(_)), "{error}");
        }
        for path in ["", "a\0b"] {
            let error = Header::parse(&region(&golden_before_lists(Some(path))), 5000);
            assert!(matches!(error, Err(ErrorKind::Invalid(_))), "{error:?}");
        }
    }

    #[test]
    fn invalid_bytes_are_rejected() {
        let with = |position: usize, byte: u8| {
            let mut bytes = golden();
            bytes[position] = byte;
            Header::parse(&region(&bytes), 5000)
        };
        assert!(matches!(with(0, b'h'), Err(ErrorKind::NotHexz)));
        assert!(matches!(with(4, 2), Err(ErrorKind::UnknownVersion(2))));
        assert!(matches!(with(19, 1), Err(ErrorKind::Truncated(_))));
        assert!(matches!(with(12, 0xff), Err(ErrorKind::Truncated(_))) || with(12, 0xff).is_ok());
        assert!(matches!(with(27, 1), Err(ErrorKind::Invalid(_)))); // 2^56 parents
        assert!(matches!(with(28, 2), Err(ErrorKind::Invalid(_)))); // neither true nor false
        assert!(matches!(with(35, 9), Err(ErrorKind::Invalid(_)))); // compression 9
        let mut padded = golden();
        padded.push(1);
        assert!(matches!(Header::parse(&region(&padded), 5000), Err(ErrorKind::Invalid(_))));
    }

    #[test]
    fn iteration_counts_are_bounded() {
        assert!(check_iterations(0).is_err());
        assert!(check_iterations(600_000).is_ok());
        assert!(matches!(check_iterations(u32::MAX), Err(ErrorKind::TooLarge { .. })));
    }
}
