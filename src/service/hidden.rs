//! Finds files that a systemd unit hides from the program, such as those in home directories
//! (`ProtectHome=`). To the program, they don't exist; without this, the log couldn't say why.

use std::path::{Path, PathBuf};

use hexz_reader::storage::is_url;
use nbd_telemetry::escape;

use super::{password, sandbox};
use crate::cli::ReloadableOptions;

/// Warns about files and folders of `options` that are hidden. Must be called before the sandbox is
/// entered.
pub(crate) fn warn_hidden(options: &ReloadableOptions) {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    let snapshots = &options.snapshots;
    let password = password::password_file(snapshots.opening.password_file.as_deref());
    let archives = snapshots.paths().chain(snapshots.folders()).map(Path::to_owned);
    let paths = sandbox::policy_files(options).into_iter().chain(password).chain(archives);
    for path in paths.filter(|path| !is_url(path)) {
        if let Some((mount, setting)) = hiding_mount(&mounts, &path)
            && !path.exists()
        {
            tracing::warn!(
                reason = "hidden_by_unit",
                "the systemd unit hides {} from the program, and so {}: use another folder, or \
                 change {setting} (systemctl edit)",
                escape::path(&mount),
                escape::path(&path),
            );
        }
    }
}

/// Returns the mount that hides `path`, and the settings of a unit that cause it.
fn hiding_mount(mountinfo: &str, path: &Path) -> Option<(PathBuf, &'static str)> {
    // ID, parent, device, root within the file system, mount point, …; see proc(5).
    let mounts = mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        Some((fields.next()?, Path::new(fields.next()?)))
    });
    // Of several mounts at the same place, the last one is on top.
    let above = mounts.filter(|(_, mount)| path.starts_with(mount));
    let (root, mount) = above.max_by_key(|(_, mount)| mount.components().count())?;
    let setting = if root.contains("/systemd-private-") {
        "PrivateTmp="
    } else if root.contains("/systemd/inaccessible/") {
        "ProtectHome= or InaccessiblePaths="
    } else {
        return None;
    };
    Some((mount.to_owned(), setting))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_folders_are_found_among_the_mounts() {
        // As under systemd 252, shortened.
        let mounts = "\
24 30 0:22 / /proc rw,nosuid shared:12 - proc proc rw
30 1 254:1 / / ro,relatime shared:1 - ext4 /dev/vda1 rw
401 30 0:25 /systemd/inaccessible/dir /home ro,nosuid master:5 - tmpfs tmpfs rw
402 401 254:1 /home/archives /home/archives ro,relatime - ext4 /dev/vda1 rw
410 30 254:1 /tmp/systemd-private-7f-hexz-nbd.service-Ab12/tmp /tmp rw - ext4 /dev/vda1 rw
";
        let hiding = |path: &str| hiding_mount(mounts, Path::new(path));
        assert_eq!(
            hiding("/home/me/disk.hxz"),
            Some(("/home".into(), "ProtectHome= or InaccessiblePaths="))
        );
        assert_eq!(hiding("/tmp/disk.hxz"), Some(("/tmp".into(), "PrivateTmp=")));
        for visible in ["/home/archives/disk.hxz", "/homework/disk.hxz", "/srv/disk.hxz", "disk"] {
            assert_eq!(hiding(visible), None, "{visible}");
        }
    }
}
