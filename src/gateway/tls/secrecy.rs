//! Which users can read a secret file.
//!
//! The permissions of the file alone don't tell: Docker mounts secrets with mode 0444 and
//! Kubernetes with 0644, and those who could read them are in the same container. What tells is
//! whether other users can reach the file.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags, statfs, statvfs, statx,
};

use super::problem::TlsProblem;

/// Refuses a secret that every user of this machine can read.
///
/// It is taken if other users may not read it; if a folder on the way to it (symbolic links
/// resolved) lets no other users through; or if a container runtime has mounted it for this
/// container: then the process is in a PID namespace of its own, and the file is on a read-only
/// file system in memory that is mounted apart from those that systems have themselves. What a
/// file's group may do is its owner's choice.
///
/// # Errors
/// Others can read it, or it can't be examined.
pub fn check_secrecy(path: &Path) -> Result<(), TlsProblem> {
    const READ_BY_OTHERS: u32 = 0o004;
    let mode = std::fs::metadata(path)?.mode() & 0o7777;
    if mode & READ_BY_OTHERS == 0 {
        return Ok(());
    }
    // What has no path, such as a file that was removed, is reached by those who have it open.
    let is_out_of_reach = std::fs::canonicalize(path).is_ok_and(|real| {
        is_behind_closed_folder(&real).unwrap_or(false)
            || (is_in_container() && is_mounted_secret(&real).unwrap_or(false))
    });
    if is_out_of_reach { Ok(()) } else { Err(TlsProblem::Exposed { mode, path: path.to_owned() }) }
}

/// Returns true if a folder above it can be entered only by its owner and its group.
fn is_behind_closed_folder(real: &Path) -> io::Result<bool> {
    const ENTERED_BY_OTHERS: u32 = 0o001;
    for folder in real.ancestors().skip(1) {
        if std::fs::metadata(folder)?.mode() & ENTERED_BY_OTHERS == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns true if this process is in another PID namespace than the machine's first one.
fn is_in_container() -> bool {
    // PROC_PID_INIT_INO (linux/nsfs.h): always the same.
    const FIRST: u64 = 0xEFFF_FFFC;
    std::fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() != FIRST)
}

/// Returns true if it is on a mount as container runtimes make them for secrets.
fn is_mounted_secret(real: &Path) -> rustix::io::Result<bool> {
    // Linux, linux/magic.h.
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58F6;
    /// Those that a service sees of its machine, perhaps read-only (systemd: `ProtectSystem=`).
    const OF_SYSTEMS: [&str; 6] = ["/", "/run", "/tmp", "/var/tmp", "/dev", "/dev/shm"];
    let is_in_memory = [TMPFS, RAMFS].contains(&statfs(real)?.f_type);
    let is_read_only = statvfs(real)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    if !is_in_memory || !is_read_only {
        return Ok(false);
    }
    for folder in real.ancestors() {
        let status = statx(CWD, folder, AtFlags::empty(), StatxFlags::empty())?;
        if status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Ok(OF_SYSTEMS.iter().all(|place| folder != Path::new(place)));
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
    fn a_closed_folder_keeps_others_away() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("below");
        let path = below.join("key.pem");
        fs::create_dir(&below).unwrap();
        fs::write(&path, "").unwrap();
        let is_refused = |path: &Path| match check_secrecy(path) {
            Ok(()) => false,
            Err(TlsProblem::Exposed { mode, .. }) => {
                assert_ne!(mode & 0o004, 0);
                true
            }
            Err(other) => panic!("{other}"),
        };
        // Of the file, its folder and the one above; above those anybody may pass.
        for (modes, refused) in [
            ([0o600, 0o755, 0o755], false),
            ([0o640, 0o755, 0o755], false),
            ([0o644, 0o755, 0o755], true),
            ([0o444, 0o755, 0o755], true),
            ([0o604, 0o711, 0o711], true),
            ([0o644, 0o700, 0o755], false),
            ([0o644, 0o750, 0o755], false),
            ([0o644, 0o755, 0o700], false),
            // Listing a folder isn't entering it.
            ([0o444, 0o754, 0o755], false),
        ] {
            for (path, mode) in [&path, &below, folder.path()].into_iter().zip(modes) {
                set(path, mode);
            }
            assert_eq!(is_refused(&path), refused, "{modes:?}");
        }
        // It counts where the file really is, not how it is called.
        for (path, mode) in [(&*path, 0o644), (&below, 0o755), (folder.path(), 0o755)] {
            set(path, mode);
        }
        let closed = tempfile::tempdir().unwrap();
        let link = closed.path().join("link.pem");
        symlink(&path, &link).unwrap();
        assert!(is_refused(&link));
        assert!(matches!(check_secrecy(&below.join("none")), Err(TlsProblem::Io(_))));
    }
}
