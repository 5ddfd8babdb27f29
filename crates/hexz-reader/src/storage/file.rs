//! Storage backed by a local file or block device.

use std::fs::{File, Metadata};
use std::io::{self, IoSliceMut, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::{ReadWriteFlags, preadv2};

use super::{FileId, Stamp, Storage};

/// An open file. It keeps reading the same file after the path has been given to another one.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    length: u64,
    stamp: FileStamp,
    is_file: bool,
}

/// Attributes that change when a file is replaced or modified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    device: u64,
    inode: u64,
    /// Number of the device, if it is a block device.
    block_device: Option<u64>,
    length: u64,
    modified: (i64, i64),
    /// Time of the last status change (ctime). Unlike the modification time, it can't be set back.
    /// It also changes if only the file's name or permissions change.
    changed: (i64, i64),
}

impl FileStamp {
    /// Returns the stamp of the file at `path`; `None` if its metadata can't be read.
    pub fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().map(Self::from)
    }

    /// Returns the identity of the file.
    pub fn id(&self) -> FileId {
        match self.block_device {
            Some(number) => FileId::Device(number),
            None => FileId::File(self.device, self.inode),
        }
    }
}

impl From<&Metadata> for FileStamp {
    fn from(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            block_device: file.file_type().is_block_device().then(|| file.rdev()),
            length: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

impl FileStorage {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// It can't be opened, or is neither a regular file nor a block device. Other kinds are
    /// rejected before they are opened, since opening a pipe would wait for a writer.
    pub fn open(path: &Path) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if kind.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "is a directory"));
        }
        if !kind.is_file() && !kind.is_block_device() {
            let message = "neither a regular file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Self::of(File::open(path)?, path)
    }

    /// Opens `path` for reading. The path must be a regular file, and its last component must not
    /// be a symbolic link.
    ///
    /// # Errors
    /// It can't be opened, or is a symbolic link or not a regular file.
    pub fn open_no_follow(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            let message = "not a regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Self::of(file, path)
    }

    fn of(mut file: File, path: &Path) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let (stamp, is_file) = (FileStamp::from(&metadata), metadata.is_file());
        // The metadata of a block device has no length, so seek to its end.
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, path: path.to_owned(), length, stamp, is_file })
    }
}

impl Storage for FileStorage {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let length = buffer.len();
        let mut buffers = [IoSliceMut::new(buffer)];
        // A failed or partial read is left to `read_exact_at`: bytes behind the part may have to be
        // read from the disk, and a file system may not support the flag.
        let read = preadv2(&self.file, &mut buffers, offset, ReadWriteFlags::NOWAIT);
        Ok(read.is_ok_and(|count| count == length))
    }

    fn is_current(&self) -> bool {
        FileStamp::of(&self.path) == Some(self.stamp)
    }

    fn stamp(&self) -> Option<Stamp> {
        // Writes to a block device don't change its timestamps.
        self.is_file.then_some(Stamp::File(self.stamp))
    }

    fn file_id(&self) -> Option<FileId> {
        Some(self.stamp.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn cached_bytes_are_read_without_waiting() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0123456789").unwrap();
        let storage = FileStorage::open(file.path()).unwrap();
        let mut buffer = [0; 4];
        // They have just been written, so they are in the page cache. Not every file system
        // supports such reads.
        if storage.try_read_exact_at(&mut buffer, 3).unwrap() {
            assert_eq!(&buffer, b"3456");
        }
        for offset in [7, 10, u64::MAX] {
            assert!(!storage.try_read_exact_at(&mut buffer, offset).unwrap(), "{offset}");
            assert!(storage.read_exact_at(&mut buffer, offset).is_err(), "{offset}");
        }
    }
}
