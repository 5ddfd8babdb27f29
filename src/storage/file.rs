//! A local file or block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use super::Storage;

/// An open file. It goes on reading the same file when the name is given to another.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    length: u64,
    identity: (u64, u64),
}

impl FileStorage {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// It can't be opened, or it is neither a file nor a block device. Other kinds are
    /// refused before they are opened, since opening a pipe would wait for a writer.
    pub fn open(path: &Path) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if kind.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
        }
        if !kind.is_file() && !kind.is_block_device() {
            let message = "it is neither a regular file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        // A block device's metadata has no length; its end does.
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, length, identity: (metadata.dev(), metadata.ino()) })
    }

    /// Device and inode: the same for every name of the same file.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }
}

impl Storage for FileStorage {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}
