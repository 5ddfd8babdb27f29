//! The files: opened, locked and allocated at the start. Later they are only read and written.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use super::allocation::{Allocation, allocate, allocate_chunks, set_length};
use super::error::DiskCacheError;
use super::format::{ENTRY_SIZE, Entry, HEAD_SIZE, Head, Nonce, RECORD_SIZE, Record};
use super::{CHUNK_SIZE, DiskCacheConfig, RECORDS};

/// Bytes of `slots` and `objects` that are read at a time.
const READ_SIZE: usize = 1 << 20;

/// Names of the files in the folder.
pub(super) const FILE_NAMES: [&str; 3] = ["slots", "chunks", "objects"];

/// Open files of a cache.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) slots: File,
    pub(super) chunks: File,
    pub(super) objects: File,
    pub(super) head: Head,
    /// Error that all reads and writes fail with.
    #[cfg(test)]
    pub(super) fault: parking_lot::Mutex<Option<io::ErrorKind>>,
}

impl Files {
    /// Opens and locks the files, creates those that are missing, and allocates the space.
    pub(super) fn open(
        config: &DiskCacheConfig,
        allocation: Allocation,
        min_slots: u32,
    ) -> Result<Self, DiskCacheError> {
        let DiskCacheConfig { folder, size } = config;
        let minimum = u64::from(min_slots) * CHUNK_SIZE;
        if *size < minimum {
            let folder = folder.clone();
            return Err(DiskCacheError::TooSmall { folder, size: *size, minimum });
        }
        if !folder.exists() {
            let created = DirBuilder::new().mode(0o700).create(folder);
            created.map_err(|error| DiskCacheError::io(folder, error))?;
        }
        let [slots, chunks, objects] = FILE_NAMES.map(|name| folder.join(name));
        let slots_file = open_to_write(&slots)?;
        lock(&slots_file, folder, &slots)?;
        let (chunks_file, objects_file) = (open_to_write(&chunks)?, open_to_write(&objects)?);

        // The small files come first: the chunks may take all the space that is left.
        let length = u64::from(RECORDS) * RECORD_SIZE as u64;
        set_length(&objects_file, length, allocation).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull => {
                DiskCacheError::NoSpace { folder: folder.clone(), available: 0, minimum }
            }
            _ => DiskCacheError::io(&objects, error),
        })?;
        // If there is no space for all entries, there is none for as many chunks.
        allocate(&slots_file, slots_length(size / CHUNK_SIZE), allocation)
            .map_err(|error| DiskCacheError::io(&slots, error))?;
        let size = allocate_chunks(&chunks_file, config, allocation, minimum)?;
        let count = u32::try_from(size / CHUNK_SIZE).unwrap_or(u32::MAX - 1);
        let old = read_head(&slots_file).map_err(|error| DiskCacheError::io(&slots, error))?;
        let nonce = match old {
            OldHead::Valid(head) => head.nonce,
            OldHead::Empty => new_nonce(),
            OldHead::Invalid => {
                tracing::info!(
                    reason = "disk_cache_renewed",
                    "{}: the disk cache is damaged or of another version; starting an empty one",
                    folder.display()
                );
                new_nonce()
            }
        };
        let head = Head { slots: count, nonce };
        let prepared = set_length(&slots_file, slots_length(count.into()), allocation)
            .and_then(|()| slots_file.write_all_at(&head.encode(), 0))
            .and_then(|()| slots_file.sync_data());
        prepared.map_err(|error| DiskCacheError::io(&slots, error))?;
        Ok(Self {
            slots: slots_file,
            chunks: chunks_file,
            objects: objects_file,
            head,
            #[cfg(test)]
            fault: parking_lot::Mutex::default(),
        })
    }

    /// Opens the files of an existing cache for reading only, without locking them.
    pub(super) fn open_to_read(folder: &Path) -> Result<Self, DiskCacheError> {
        let open = |name| {
            let path = folder.join(name);
            let file = OpenOptions::new().read(true).custom_flags(flags()).open(&path);
            file.map_err(|error| DiskCacheError::io(&path, error))
        };
        let [slots, chunks, objects] = FILE_NAMES.map(open);
        let (slots, chunks, objects) = (slots?, chunks?, objects?);
        match read_head(&slots) {
            Ok(OldHead::Valid(head)) => Ok(Self {
                slots,
                chunks,
                objects,
                head,
                #[cfg(test)]
                fault: parking_lot::Mutex::default(),
            }),
            _ => Err(DiskCacheError::NotACache { folder: folder.to_owned() }),
        }
    }

    /// Returns all valid entries, with their slots.
    pub(super) fn entries(&self) -> io::Result<Vec<(u32, Entry)>> {
        let mut entries = Vec::new();
        let mut buffer = vec![0; READ_SIZE];
        let per_buffer = READ_SIZE / ENTRY_SIZE;
        for first in (0..self.head.slots).step_by(per_buffer) {
            let read = read_up_to(&self.slots, &mut buffer, entry_offset(first))?;
            let bytes = buffer.get(..read).unwrap_or_default();
            let decode =
                |(slot, bytes)| Some((slot, Entry::decode(bytes, &self.head.nonce, slot)?));
            entries
                .extend((first..self.head.slots).zip(bytes.chunks(ENTRY_SIZE)).filter_map(decode));
        }
        Ok(entries)
    }

    /// Returns all valid records, with their numbers.
    pub(super) fn records(&self) -> io::Result<Vec<(u32, Record)>> {
        let mut records = Vec::new();
        let mut buffer = vec![0; READ_SIZE];
        for first in (0..RECORDS).step_by(READ_SIZE / RECORD_SIZE) {
            let read = read_up_to(&self.objects, &mut buffer, record_offset(first))?;
            let bytes = buffer.get(..read).unwrap_or_default();
            let decode =
                |(number, bytes)| Some((number, Record::decode(bytes, &self.head.nonce, number)?));
            records.extend((first..RECORDS).zip(bytes.chunks(RECORD_SIZE)).filter_map(decode));
        }
        Ok(records)
    }

    /// Reads the entry of a slot; `None` if it isn't valid.
    pub(super) fn entry(&self, slot: u32) -> io::Result<Option<Entry>> {
        self.check_fault()?;
        let mut bytes = [0; ENTRY_SIZE];
        let read = read_up_to(&self.slots, &mut bytes, entry_offset(slot))?;
        let bytes = bytes.get(..read).unwrap_or_default();
        Ok(Entry::decode(bytes, &self.head.nonce, slot))
    }

    /// Writes the entry of a slot, or frees it.
    pub(super) fn write_entry(&self, slot: u32, entry: Option<&Entry>) -> io::Result<()> {
        self.check_fault()?;
        let bytes = entry.map_or([0; ENTRY_SIZE], |entry| entry.encode(&self.head.nonce, slot));
        self.slots.write_all_at(&bytes, entry_offset(slot))
    }

    /// Reads the bytes of a slot, fewer if the file is shorter.
    pub(super) fn chunk(&self, slot: u32, length: u32) -> io::Result<Vec<u8>> {
        self.check_fault()?;
        let mut bytes = vec![0; to_usize(length)];
        let read = read_up_to(&self.chunks, &mut bytes, chunk_offset(slot))?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Writes the bytes of a slot.
    pub(super) fn write_chunk(&self, slot: u32, bytes: &[u8]) -> io::Result<()> {
        self.check_fault()?;
        self.chunks.write_all_at(bytes, chunk_offset(slot))
    }

    /// Reads a record; fewer bytes if the file is shorter.
    pub(super) fn record(&self, number: u32) -> io::Result<Vec<u8>> {
        self.check_fault()?;
        let mut bytes = vec![0; RECORD_SIZE];
        let read = read_up_to(&self.objects, &mut bytes, record_offset(number))?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Writes a record.
    pub(super) fn write_record(&self, number: u32, bytes: &[u8]) -> io::Result<()> {
        self.check_fault()?;
        self.objects.write_all_at(bytes, record_offset(number))
    }

    /// Writes everything to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.check_fault()?;
        [&self.chunks, &self.slots, &self.objects].into_iter().try_for_each(File::sync_data)
    }

    #[cfg(test)]
    fn check_fault(&self) -> io::Result<()> {
        self.fault.lock().map_or(Ok(()), |kind| Err(kind.into()))
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests inject faults")]
    fn check_fault(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns true if another process has locked `slots`.
pub(super) fn is_locked(slots: &File) -> io::Result<bool> {
    match slots.try_lock_shared() {
        Ok(()) => slots.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Locks `slots` for this process.
pub(super) fn lock(slots: &File, folder: &Path, path: &Path) -> Result<(), DiskCacheError> {
    slots.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => DiskCacheError::InUse { folder: folder.to_owned() },
        TryLockError::Error(error) => DiskCacheError::io(path, error),
    })
}

/// Head that a file had before it was opened.
enum OldHead {
    Valid(Head),
    Empty,
    Invalid,
}

fn read_head(slots: &File) -> io::Result<OldHead> {
    let mut bytes = [0; HEAD_SIZE];
    let read = read_up_to(slots, &mut bytes, 0)?;
    Ok(match bytes.get(..read).and_then(Head::decode) {
        Some(head) => OldHead::Valid(head),
        None if bytes == [0; HEAD_SIZE] => OldHead::Empty,
        None => OldHead::Invalid,
    })
}

fn new_nonce() -> Nonce {
    let mut nonce = [0; 16];
    // Without randomness, only entries of an older cache in the same files might count again. Their
    // bytes match their hashes all the same.
    if aws_lc_rs::rand::fill(&mut nonce).is_err() {
        nonce = std::process::id().to_le_bytes().repeat(4).try_into().unwrap_or(nonce);
    }
    nonce
}

fn flags() -> i32 {
    (OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK).bits().cast_signed()
}

fn open_to_write(path: &Path) -> Result<File, DiskCacheError> {
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(flags()).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        if metadata.permissions().mode() & 0o7777 != 0o600 {
            file.set_permissions(Permissions::from_mode(0o600))?;
        }
        Ok(file)
    };
    open().map_err(|error| DiskCacheError::io(path, error))
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while let Some(rest) = buffer.get_mut(read..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + read as u64) {
            Ok(0) => break,
            Ok(length) => read += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// Returns the length of `slots`.
fn slots_length(count: u64) -> u64 {
    HEAD_SIZE as u64 + count * ENTRY_SIZE as u64
}

fn entry_offset(slot: u32) -> u64 {
    HEAD_SIZE as u64 + u64::from(slot) * ENTRY_SIZE as u64
}

fn chunk_offset(slot: u32) -> u64 {
    u64::from(slot) * CHUNK_SIZE
}

fn record_offset(number: u32) -> u64 {
    u64::from(number) * RECORD_SIZE as u64
}

fn to_usize(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
