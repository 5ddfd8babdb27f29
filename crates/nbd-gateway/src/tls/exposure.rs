//! Checks that a secret file can't be read by other users.
//!
//! The permissions of the file alone don't show that: Docker mounts secrets with mode 0444 and
//! Kubernetes with 0644, and only processes of the same container could read them. What matters
//! is whether other users can reach the file.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags, statfs, statvfs, statx,
};

use super::problem::TlsFileProblem;

/// Rejects a secret that every user of this machine can read.
///
/// The file is accepted in three cases: other users may not read it; a folder in its path (with
/// symbolic links resolved) can't be entered by other users; or a container runtime has mounted it
/// for this container. The last is assumed if the process is in its own PID namespace, and the file
/// is on a read-only in-memory file system that isn't one of the usual system mounts. Group
/// permissions are left to the owner of the file.
///
/// # Errors
/// Others can read the file, or it can't be examined.
pub fn check_not_exposed(path: &Path) -> Result<(), TlsFileProblem> {
    const READ_BY_OTHERS: u32 = 0o004;
    let mode = std::fs::metadata(path)?.mode() & 0o7777;
    if mode & READ_BY_OTHERS == 0 {
        return Ok(());
    }
    // A file without a path, such as one that was removed, counts as exposed: processes that have
    // it open can read it.
    let is_out_of_reach = std::fs::canonicalize(path).is_ok_and(|real| {
        has_private_ancestor(&real).unwrap_or(false)
            || (is_in_container() && is_mounted_secret(&real).unwrap_or(false))
    });
    if is_out_of_reach {
        Ok(())
    } else {
        Err(TlsFileProblem::Exposed { mode, path: path.to_owned() })
    }
}

/// Returns true if a folder above the file can be entered only by its owner and its group.
fn has_private_ancestor(real: &Path) -> io::Result<bool> {
    const ENTERED_BY_OTHERS: u32 = 0o001;
    for folder in real.ancestors().skip(1) {
        if std::fs::metadata(folder)?.mode() & ENTERED_BY_OTHERS == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns true if this process is in another PID namespace than the machine's initial one.
fn is_in_container() -> bool {
    // PROC_PID_INIT_INO (linux/nsfs.h), a constant.
    const FIRST: u64 = 0xEFFF_FFFC;
    std::fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() != FIRST)
}

/// Returns true if the file is on a mount of the kind that container runtimes use for secrets.
fn is_mounted_secret(real: &Path) -> rustix::io::Result<bool> {
    // From linux/magic.h.
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58F6;
    /// Mounts of the host that a service sees, possibly read-only (systemd: `ProtectSystem=`).
    const SYSTEM_MOUNTS: [&str; 6] = ["/", "/run", "/tmp", "/var/tmp", "/dev", "/dev/shm"];
    let is_in_memory = [TMPFS, RAMFS].contains(&statfs(real)?.f_type);
    let is_read_only = statvfs(real)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    if !is_in_memory || !is_read_only {
        return Ok(false);
    }
    for folder in real.ancestors() {
        let status = statx(CWD, folder, AtFlags::empty(), StatxFlags::empty())?;
        if status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Ok(SYSTEM_MOUNTS.iter().all(|mount| folder != Path::new(mount)));
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn private_ancestor_protects_readable_file() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("below");
        let path = below.join("key.pem");
        fs::create_dir(&below).unwrap();
        fs::write(&path, "").unwrap();
        let is_refused = |path: &Path| match check_not_exposed(path) {
            Ok(()) => false,
            Err(TlsFileProblem::Exposed { mode, .. }) => {
                assert_ne!(mode & 0o004, 0);
                true
            }
            Err(other) => panic!("{other}"),
        };
        // Modes of the file, its folder and the parent; the folders above those are open to all.
        for (modes, refused) in [
            ([0o600, 0o755, 0o755], false),
            ([0o640, 0o755, 0o755], false),
            ([0o644, 0o755, 0o755], true),
            ([0o444, 0o755, 0o755], true),
            ([0o604, 0o711, 0o711], true),
            ([0o644, 0o700, 0o755], false),
            ([0o644, 0o750, 0o755], false),
            ([0o644, 0o755, 0o700], false),
            // Permission to list a folder isn't permission to enter it.
            ([0o444, 0o754, 0o755], false),
        ] {
            for (path, mode) in [&path, &below, folder.path()].into_iter().zip(modes) {
                set(path, mode);
            }
            assert_eq!(is_refused(&path), refused, "{modes:?}");
        }
        // The real location counts, not the path given.
        for (path, mode) in [(&*path, 0o644), (&below, 0o755), (folder.path(), 0o755)] {
            set(path, mode);
        }
        let closed = tempfile::tempdir().unwrap();
        let link = closed.path().join("link.pem");
        symlink(&path, &link).unwrap();
        assert!(is_refused(&link));
        assert!(matches!(check_not_exposed(&below.join("none")), Err(TlsFileProblem::Io(_))));
    }
}
