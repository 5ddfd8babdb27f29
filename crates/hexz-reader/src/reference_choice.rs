//! Decisions of an operator for references to parents that can be read by offset or by hash, with
//! different bytes.

use std::ffi::OsString;
use std::path::Path;
use std::str::FromStr;

use super::OpenOptions;

/// Interpretation of a reference to a parent that may be by offset or by hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReferenceMode {
    /// The parent's bytes at the same offset, as written by `hexz commit --thin` and
    /// `merge_overlay`.
    Offset,
    /// The block with the same hash, as written by `Writer(parent=…)`.
    Hash,
}

/// An operator's decision for ambiguous references: `MODE`, or `FILE=MODE` for the archive with
/// that file name, without directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceChoice {
    file: Option<OsString>,
    mode: ReferenceMode,
}

/// Error for text that isn't a valid [`ReferenceChoice`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected \"offset\", \"hash\", FILE=offset or FILE=hash, with a file name")]
pub struct ReferenceChoiceError;

impl FromStr for ReferenceChoice {
    type Err = ReferenceChoiceError;

    fn from_str(text: &str) -> Result<Self, ReferenceChoiceError> {
        let (file, mode) = match text.rsplit_once('=') {
            Some((file, mode)) => (Some(OsString::from(file)), mode),
            None => (None, text),
        };
        let mode = match mode {
            "offset" => ReferenceMode::Offset,
            "hash" => ReferenceMode::Hash,
            _ => return Err(ReferenceChoiceError),
        };
        let is_name = |file: &OsString| Path::new(file).file_name() == Some(file);
        if file.as_ref().is_none_or(is_name) {
            Ok(Self { file, mode })
        } else {
            Err(ReferenceChoiceError)
        }
    }
}

impl OpenOptions {
    /// Returns the decision for the archive at `path`: the last one that names it, or else the last
    /// one that names no file.
    pub(super) fn reference_mode(&self, path: &Path) -> Option<ReferenceMode> {
        let last = |names: &dyn Fn(&ReferenceChoice) -> bool| {
            self.reference_choices.iter().rev().find(|choice| names(choice))
        };
        last(&|choice| choice.file.is_some() && choice.file.as_deref() == path.file_name())
            .or_else(|| last(&|choice| choice.file.is_none()))
            .map(|choice| choice.mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_parsed_with_and_without_file_name() {
        let choice = |text: &str| text.parse::<ReferenceChoice>();
        let named = |file: &str, mode| Ok(ReferenceChoice { file: Some(file.into()), mode });
        assert_eq!(
            choice("offset"),
            Ok(ReferenceChoice { file: None, mode: ReferenceMode::Offset })
        );
        assert_eq!(choice("a.hxz=hash"), named("a.hxz", ReferenceMode::Hash));
        assert_eq!(choice("a=b.hxz=offset"), named("a=b.hxz", ReferenceMode::Offset));
        for bad in ["", "=", "=hash", "a.hxz", "a.hxz=", "a.hxz=both", "f/a.hxz=hash", "..=hash"] {
            assert_eq!(choice(bad), Err(ReferenceChoiceError), "{bad}");
        }
    }

    #[test]
    fn last_matching_choice_wins() {
        let choices = ["offset", "a.hxz=hash", "b.hxz=hash", "b.hxz=offset", "hash"];
        let choices = choices.iter().map(|text| text.parse().unwrap()).collect();
        let options = OpenOptions { reference_choices: choices, ..OpenOptions::default() };
        let mode = |path: &str| options.reference_mode(Path::new(path));
        assert_eq!(mode("/x/a.hxz"), Some(ReferenceMode::Hash));
        assert_eq!(mode("/x/b.hxz"), Some(ReferenceMode::Offset));
        assert_eq!(mode("c.hxz"), Some(ReferenceMode::Hash));
        assert_eq!(OpenOptions::default().reference_mode(Path::new("a.hxz")), None);
    }
}
