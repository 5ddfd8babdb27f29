//! Advice for problems with archives, which names options of the program.

use hexz_exports::Hints;
use hexz_reader::{Error, ErrorKind, Remark};

/// The advice for log lines of the service.
pub(crate) const HINTS: Hints = Hints { for_error: of_error, for_remark: of_remark };

/// Returns the error, followed by the advice for it, if there is any.
pub(crate) fn with_hint(error: &Error) -> String {
    match of_error(&error.kind) {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

/// Returns the advice for an error.
pub(crate) fn of_error(kind: &ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::NotHexz => "make an archive of a disk image: hexz pack disk.img disk.hxz",
        ErrorKind::PasswordNeeded => {
            "give the password by --password-file, the systemd credential hexz-nbd.password or the \
             environment variable HEXZ_PASSWORD"
        }
        ErrorKind::DirectoryArchive => {
            "extract it with the Hexz tools, or use --raw for the concatenated files"
        }
        ErrorKind::ParentMissing { is_outside: false, .. } => {
            "put the parent next to the archive, or name its directory with --parent-dir"
        }
        ErrorKind::ParentMissing { .. } => {
            "put the parent next to the archive, or name its directory with --parent-dir; \
             --allow-parent-anywhere trusts the path in the archive"
        }
        ErrorKind::NotSigned => {
            "--verify-key requires a signature of each archive and its parents: hexz sign"
        }
        ErrorKind::InvalidSignature => {
            "get the archive again from its source, or add its key with --verify-key if you trust \
             that"
        }
        ErrorKind::NoDigest => {
            "if you trust the file, add the output of hexz-nbd digest to --digest"
        }
        ErrorKind::DigestMismatch { .. } => {
            "get the file again from its source, or update --digest if you trust the file"
        }
        ErrorKind::ContentChanged => "restore the file that matches --digest",
        ErrorKind::EndsEarly { .. } => "--zero-uncovered reads the rest as zeros, as Hexz does",
        ErrorKind::Ambiguous(_) => {
            "decide with --resolve-references FILE=offset for an archive of hexz commit --thin or \
             merge_overlay, FILE=hash for one that was packed against its parent"
        }
        ErrorKind::KeyIterations { .. } => {
            "if you trust the archive, allow more with --max-key-iterations"
        }
        _ => return None,
    })
}

/// Returns the advice for a remark.
pub(crate) fn of_remark(remark: &Remark) -> Option<&'static str> {
    match remark {
        Remark::EndsEarly { reads_zeros: false, .. } => {
            Some("--zero-uncovered reads the rest as zeros, as Hexz does")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_name_the_option_that_helps() {
        let missing = |is_outside| ErrorKind::ParentMissing {
            name: "base.hxz".to_owned(),
            tried: Vec::new(),
            is_outside,
        };
        let (got, limit) = (2, 1);
        for (kind, option) in [
            (ErrorKind::PasswordNeeded, "--password-file"),
            (ErrorKind::DirectoryArchive, "--raw"),
            (missing(false), "--parent-dir"),
            (missing(true), "--allow-parent-anywhere"),
            (ErrorKind::NotSigned, "--verify-key"),
            (ErrorKind::InvalidSignature, "--verify-key"),
            (ErrorKind::NoDigest, "--digest"),
            (ErrorKind::ContentChanged, "--digest"),
            (ErrorKind::KeyIterations { got, limit }, "--max-key-iterations"),
        ] {
            assert!(of_error(&kind).unwrap().contains(option), "{kind}");
        }
        assert_eq!(of_error(&ErrorKind::WrongPassword), None);
    }
}
