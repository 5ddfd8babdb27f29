//! Layouts of the archive format, all of which have version number 1.
//!
//! Layouts differ in two respects: the form of the header field that names parents, and whether
//! entries of index pages have a hash. Together these identify the versions that write an archive,
//! and the meaning of its references to parents.

use super::header::{Header, ParentsField};

/// Form of the entries of index pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryForm {
    /// Offset, stored length, length and checksum.
    WithoutHash,
    /// Offset, stored length, length, checksum and BLAKE3 hash of the block.
    WithHash,
}

/// Size of the entry count at the start of a page, in bytes.
pub(super) const PAGE_HEADER_LEN: u32 = 8;

impl EntryForm {
    /// Returns the size of an entry, in bytes.
    pub(super) fn size(self) -> u32 {
        match self {
            Self::WithoutHash => 20,
            Self::WithHash => 52,
        }
    }

    /// Returns the form in which `count` entries make a page of `length` bytes. At most one form
    /// fits, and none if `count` is zero.
    pub(super) fn of_page(length: u32, count: u64) -> Option<Self> {
        [Self::WithHash, Self::WithoutHash].into_iter().find(|form| {
            let entries = count.checked_mul(form.size().into());
            count > 0
                && entries.and_then(|size| size.checked_add(PAGE_HEADER_LEN.into()))
                    == Some(length.into())
        })
    }
}

/// A published layout of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// At most one parent, entries without hashes.
    A,
    /// At most one parent, entries with hashes.
    B,
    /// Any number of parents, entries with hashes, no chunking parameters.
    C,
    /// Any number of parents, entries with hashes, chunking parameters.
    D,
    /// An archive of layout A whose header was rewritten when Hexz 0.8 signed it.
    X,
    /// Unknown layout: the archive has no blocks that would reveal it.
    Empty,
}

impl Layout {
    /// Determines the layout of an archive from its header and, if it has blocks, the form of its
    /// entries.
    pub(super) fn of(header: &Header, entries: Option<EntryForm>) -> Self {
        match (header.parents_field, entries) {
            (_, None) => Self::Empty,
            (ParentsField::Optional, Some(EntryForm::WithoutHash)) => Self::A,
            (ParentsField::Optional, Some(EntryForm::WithHash)) => Self::B,
            (ParentsField::List, Some(EntryForm::WithoutHash)) => Self::X,
            (ParentsField::List, Some(EntryForm::WithHash)) if header.chunking.is_some() => Self::D,
            (ParentsField::List, Some(EntryForm::WithHash)) => Self::C,
        }
    }

    /// Returns the versions of Hexz that write the layout.
    pub fn writers(self) -> &'static str {
        match self {
            Self::A => "hexz 0.1 to 0.4.5",
            Self::B => "hexz 0.5.0 and 0.5.1",
            Self::C => "hexz 0.5.2 to 0.7.0, and 0.8 where blocks have a fixed length",
            Self::D => "hexz 0.8",
            Self::X => "hexz 0.1 to 0.4.5, signed by 0.8",
            Self::Empty => "any version of hexz",
        }
    }

    /// Returns the letter of the layout for messages and JSON, or `empty`.
    pub fn label(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
            Self::C => "C",
            Self::D => "D",
            Self::X => "X",
            Self::Empty => "empty",
        }
    }

    /// Returns true if every reference to a parent means the block with that hash, in whichever
    /// ancestor has it.
    pub(super) fn references_by_hash(self) -> bool {
        self == Self::D
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_form_follows_from_length_and_count() {
        // 13 short entries are as long as 5 long ones; the count identifies the form.
        assert_eq!(EntryForm::of_page(268, 13), Some(EntryForm::WithoutHash));
        assert_eq!(EntryForm::of_page(268, 5), Some(EntryForm::WithHash));
        assert_eq!(EntryForm::of_page(268, 6), None);
        assert_eq!(EntryForm::of_page(8, 0), None);
        assert_eq!(EntryForm::of_page(u32::MAX, u64::MAX), None);
        for count in 1..=4096_u32 {
            for form in [EntryForm::WithoutHash, EntryForm::WithHash] {
                let length = PAGE_HEADER_LEN + count * form.size();
                assert_eq!(EntryForm::of_page(length, count.into()), Some(form));
            }
        }
    }
}
