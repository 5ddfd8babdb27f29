//! Unix sockets created by this program: their permissions, and their removal.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::unistd::{Gid, Group};
use rustix::fs::{AtFlags, CWD, Mode, chownat};
use rustix::io::Errno;
use rustix::process::umask;
use socket2::{Domain, SockAddr, Socket, Type};

use super::BACKLOG;

/// Permissions of a Unix socket. By default the umask determines the mode, and the group is that of
/// this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SocketPermissions {
    /// Mode of the socket file.
    pub mode: Option<SocketMode>,
    /// Group of the socket file.
    pub group: Option<SocketGroup>,
}

/// Mode of a socket file, written as octal digits: `0660`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(u16);

impl SocketMode {
    /// Only the owner and root can connect: 0600.
    pub const OWNER_ONLY: Self = Self(0o600);
}

impl FromStr for SocketMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_octal = !text.is_empty() && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
        match u16::from_str_radix(text, 8) {
            Ok(mode @ ..=0o777) if is_octal => Ok(Self(mode)),
            _ => Err("expected octal digits such as 0660, at most 0777".to_owned()),
        }
    }
}

/// Group of a socket file, given by name or number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketGroup {
    gid: Gid,
    /// Text that it was parsed from.
    text: String,
}

impl FromStr for SocketGroup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Group::from_name(text).map_err(|error| {
            format!("can't look up the group {:?}: {error}", nbd_telemetry::escape::name(text))
        })?;
        let gid = match (named, text.parse()) {
            (Some(group), _) => group.gid,
            // To `chown`, the highest number means "leave unchanged".
            (None, Ok(number)) if number != u32::MAX => Gid::from_raw(number),
            (None, _) => {
                return Err(format!("no group named {:?}", nbd_telemetry::escape::name(text)));
            }
        };
        Ok(Self { gid, text: text.to_owned() })
    }
}

impl fmt::Display for SocketGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Binds a socket to `path` and listens on it. Nobody can connect before it listens, so the socket
/// is never open to others than `rights` allow.
///
/// The mode is set by the umask, which belongs to the whole process: with a mode, call this before
/// another thread creates files.
pub(crate) fn bind(
    path: &Path,
    rights: &SocketPermissions,
) -> io::Result<(UnixPath, UnixListener)> {
    remove_if_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let address = SockAddr::unix(path)?;
    match rights.mode {
        Some(SocketMode(mode)) => {
            let before = umask(Mode::from_raw_mode(0o777 & !u32::from(mode)));
            let bound = socket.bind(&address);
            umask(before);
            bound?;
        }
        None => socket.bind(&address)?,
    }
    let bound = UnixPath::created(path);
    if let Some(group) = &rights.group {
        set_group(path, group)?;
    }
    socket.listen(BACKLOG)?;
    Ok((bound, socket.into()))
}

/// Changes the group of the socket, unless it has that group already: a system call filter may
/// forbid even that.
fn set_group(path: &Path, group: &SocketGroup) -> io::Result<()> {
    if std::fs::symlink_metadata(path).is_ok_and(|file| file.gid() == group.gid.as_raw()) {
        return Ok(());
    }
    let gid = rustix::fs::Gid::from_raw(group.gid.as_raw());
    chownat(CWD, path, None, Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(|errno| {
        let error = io::Error::from(errno);
        let hint = match errno {
            Errno::PERM => "; only members of a group can do that, and a systemd unit needs SystemCallFilter=fchownat",
            // The group has no number in this user namespace.
            Errno::INVAL => "; a systemd unit needs PrivateUsers=no for that",
            _ => "",
        };
        let text = format!("can't change the group of the socket to {group}: {error}{hint}");
        io::Error::new(error.kind(), text)
    })
}

/// Removes the socket at `path` if nothing listens on it any more. Removes nothing else.
fn remove_if_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    // Non-blocking: a live listener may not be accepting at the moment.
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}

/// Path of a Unix socket. A socket created by this program is removed on drop, unless the path
/// leads to another file by then.
#[derive(Debug)]
pub struct UnixPath {
    pub(crate) path: PathBuf,
    /// Device and inode of the socket file, if this program created it.
    created_inode: Option<(u64, u64)>,
}

impl UnixPath {
    fn created(path: &Path) -> Self {
        Self { path: path.to_owned(), created_inode: device_and_inode(path) }
    }

    /// Wraps the path of a socket that another process created. It isn't removed.
    pub(crate) fn not_owned(path: PathBuf) -> Self {
        Self { path, created_inode: None }
    }
}

impl Drop for UnixPath {
    fn drop(&mut self) {
        if self.created_inode.is_some() && device_and_inode(&self.path) == self.created_inode {
            std::fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

fn device_and_inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_modes_are_octal() {
        for (text, mode) in [("0660", 0o660), ("777", 0o777), ("0", 0)] {
            assert_eq!(text.parse(), Ok(SocketMode(mode)));
        }
        for junk in ["", "0880", "1777", "+660", "0o660", "rw", "6 0"] {
            assert!(junk.parse::<SocketMode>().is_err(), "{junk}");
        }
    }

    #[test]
    fn groups_are_parsed_by_name_and_number() {
        let gid = |text: &str| text.parse::<SocketGroup>().map(|group| group.gid.as_raw());
        assert_eq!([gid("root"), gid("daemon"), gid("4000000")], [Ok(0), Ok(1), Ok(4_000_000)]);
        for nobody in ["", "no such group", "-1", "4294967295", "4294967296"] {
            assert!(gid(nobody).is_err(), "{nobody}");
        }
    }
}
