//! Layouts of the format: every published version of Hexz calls its own "version 1".
//!
//! Two things differ: the field of the header that names parents, and whether an entry of an
//! index page has a hash. Together they tell which versions write an archive, and what a
//! reference to a parent means in it.

use super::header::{Header, ParentsField};

/// Form of the entries of index pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryForm {
    /// Offset, stored length, length, checksum.
    WithoutHash,
    /// The same, then the block's BLAKE3.
    WithHash,
}

/// Size of a page's count of entries, in bytes.
pub(super) const PAGE_HEAD: u32 = 8;

impl EntryForm {
    /// Size of an entry, in bytes.
    pub(super) fn size(self) -> u32 {
        match self {
            Self::WithoutHash => 20,
            Self::WithHash => 52,
        }
    }

    /// The form in which `count` entries make a page of `length` bytes. There is at most one
    /// for a count other than zero.
    pub(super) fn of_page(length: u32, count: u64) -> Option<Self> {
        [Self::WithHash, Self::WithoutHash].into_iter().find(|form| {
            let entries = count.checked_mul(form.size().into());
            count > 0
                && entries.and_then(|size| size.checked_add(PAGE_HEAD.into()))
                    == Some(length.into())
        })
    }
}

/// A published layout of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One parent at most, entries without hashes.
    A,
    /// One parent at most, entries with hashes.
    B,
    /// Any number of parents, entries with hashes, no chunking parameters.
    C,
    /// The same with chunking parameters.
    D,
    /// An archive of layout A whose header was rewritten when Hexz 0.8 signed it.
    X,
    /// Nothing in the archive tells its layout: it has no blocks.
    Empty,
}

impl Layout {
    /// Layout of an archive by its header and the form of its entries, if it has any.
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

    /// Versions of Hexz that write it.
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

    /// Letter that stands for it in messages and in JSON.
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

    /// Returns true if every reference to a parent means the block with that hash, wherever
    /// an ancestor has it.
    pub(super) fn references_by_hash(self) -> bool {
        self == Self::D
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_entries_of_one_form() {
        // 13 short entries are as long as 5 long ones: the count tells.
        assert_eq!(EntryForm::of_page(268, 13), Some(EntryForm::WithoutHash));
        assert_eq!(EntryForm::of_page(268, 5), Some(EntryForm::WithHash));
        assert_eq!(EntryForm::of_page(268, 6), None);
        assert_eq!(EntryForm::of_page(8, 0), None);
        assert_eq!(EntryForm::of_page(u32::MAX, u64::MAX), None);
        for count in 1..=4096_u32 {
            for form in [EntryForm::WithoutHash, EntryForm::WithHash] {
                let length = PAGE_HEAD + count * form.size();
                assert_eq!(EntryForm::of_page(length, count.into()), Some(form));
            }
        }
    }
}
