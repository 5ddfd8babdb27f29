//! Writes to standard output, which its reader may close.

use std::io::{Write, stdout};

use crate::exit_status::{Failure, OutputError};

/// Prints the result of a command.
pub(crate) fn print(what: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = stdout().lock();
    out.write_all(what.as_ref()).and_then(|()| out.flush()).map_err(OutputError)?;
    Ok(())
}
