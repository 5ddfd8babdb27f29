//! The Range header (RFC 9110, section 14).

use std::ops::Range;

/// Part of an object that a request selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selection {
    /// All of it: there is no Range header, or one that a server may ignore.
    Whole,
    Part(Range<u64>),
    /// No byte of the object is in the range.
    Unsatisfiable,
}

/// Resolves a Range header for an object of `length` bytes. Several ranges and malformed ones
/// select the whole object.
pub(crate) fn select(header: Option<&str>, length: u64) -> Selection {
    let Some((first, last)) = header
        .and_then(|header| header.strip_prefix("bytes="))
        .and_then(|range| range.trim().split_once('-'))
    else {
        return Selection::Whole;
    };
    let number = |text: &str| text.parse::<u64>().ok();
    let range = match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => length.saturating_sub(suffix)..length,
        (Some(first), None) if last.is_empty() => first..length,
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(length),
        _ => return Selection::Whole,
    };
    if range.start >= range.end { Selection::Unsatisfiable } else { Selection::Part(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_resolved() {
        for (header, expected) in [
            ("bytes=0-0", Selection::Part(0..1)),
            ("bytes=2-5", Selection::Part(2..6)),
            ("bytes=8-100", Selection::Part(8..10)),
            ("bytes=4-", Selection::Part(4..10)),
            ("bytes=-3", Selection::Part(7..10)),
            ("bytes=-30", Selection::Part(0..10)),
            ("bytes=-0", Selection::Unsatisfiable),
            ("bytes=10-", Selection::Unsatisfiable),
            ("bytes=5-4", Selection::Whole),
            ("bytes=0-1,4-5", Selection::Whole),
            ("bytes=-", Selection::Whole),
            ("pages=0-1", Selection::Whole),
        ] {
            assert_eq!(select(Some(header), 10), expected, "{header}");
        }
        assert_eq!(select(None, 10), Selection::Whole);
        assert_eq!(select(Some("bytes=-3"), 0), Selection::Unsatisfiable);
    }
}
