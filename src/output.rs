//! The standard output of commands, which whoever reads it may close.

use std::io::{self, Write, stdout};

use crate::failure::Failure;

/// Prints what a command has found out.
pub(crate) fn print(what: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = stdout().lock();
    out.write_all(what.as_ref()).and_then(|()| out.flush()).map_err(Failure::Output)
}

/// Returns true if nobody reads the output any more, as behind `| head`.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}
