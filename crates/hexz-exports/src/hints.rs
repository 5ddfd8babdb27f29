//! Advice for log lines about archives.

use hexz_reader::{Error, ErrorKind, Remark};

use super::folder_access;

/// Advice that log lines have as the field `hint`, such as the name of the option with which a
/// program's user can solve the problem. By default there is none.
#[derive(Debug, Clone, Copy)]
pub struct Hints {
    /// Returns the advice for an error.
    pub for_error: fn(&ErrorKind) -> Option<&'static str>,
    /// Returns the advice for a remark about an open archive.
    pub for_remark: fn(&Remark) -> Option<&'static str>,
}

impl Default for Hints {
    fn default() -> Self {
        Self { for_error: |_| None, for_remark: |_| None }
    }
}

impl Hints {
    /// Returns the advice for an archive that can't be opened. Blocking: it examines the file if
    /// access was denied.
    pub(super) fn for_open_error(self, error: &Error) -> Option<&'static str> {
        folder_access::hint(error).or_else(|| (self.for_error)(&error.kind))
    }
}
