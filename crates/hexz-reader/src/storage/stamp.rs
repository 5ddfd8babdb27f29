//! Identity and version of files and objects.

use super::FileStamp;

/// Identity of a file, block device or object, the same for all its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileId {
    /// A file, identified by the device that contains it and its inode.
    File(u64, u64),
    /// A block device, identified by its number, since several nodes may refer to it.
    Device(u64),
    /// An object in a store, identified by a hash of its URL.
    Object([u8; 16]),
}

/// Attributes that change when a file or object is replaced or modified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    /// Attributes of a file.
    File(FileStamp),
    /// Attributes of an object.
    Object(ObjectStamp),
}

/// Attributes of an object in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectStamp {
    /// Hash of the object's URL.
    pub url: [u8; 16],
    /// Hash of the object's version; `None` while it isn't known.
    pub version: Option<[u8; 16]>,
}

impl Stamp {
    /// Returns the identity of the file or object.
    pub fn id(&self) -> FileId {
        match self {
            Self::File(stamp) => stamp.id(),
            Self::Object(stamp) => FileId::Object(stamp.url),
        }
    }
}
