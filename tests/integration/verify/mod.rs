//! Checking archives: every block, signatures, digests, and the command that does it.

mod command;
mod digests;
mod mapped;
pub(crate) mod ranges;
mod signatures;
mod skip_hashes;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use hexz_reader::storage::{FileId, Storage};
use hexz_reader::{Error, OpenOptions, Snapshot};

use crate::snapshot::with_password;

/// Bytes in memory that note what is read of them, and become others after some reads.
#[derive(Debug)]
struct Watched {
    bytes: Vec<u8>,
    later: Vec<u8>,
    /// How many reads get the former bytes.
    switch_after: usize,
    reads: Mutex<Vec<Range<u64>>>,
}

impl Watched {
    fn new(bytes: &[u8], later: &[u8], switch_after: usize) -> Arc<Self> {
        let (bytes, later) = (bytes.to_vec(), later.to_vec());
        Arc::new(Self { bytes, later, switch_after, reads: Mutex::default() })
    }

    /// Opens it under the name `name`.
    fn open(self: &Arc<Self>, name: &str, options: OpenOptions) -> Result<Snapshot, Error> {
        let storage: Arc<dyn Storage> = Arc::<Self>::clone(self);
        let options = OpenOptions { raw: true, password: with_password().password, ..options };
        Snapshot::from_storage(Path::new(name), storage, &options)
    }

    /// How often each byte has been read at the most.
    fn most_reads(&self, of: Range<usize>) -> usize {
        let reads = self.reads.lock().unwrap();
        of.map(|at| reads.iter().filter(|read| read.contains(&(at as u64))).count()).max().unwrap()
    }
}

impl Storage for Watched {
    fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut reads = self.reads.lock().unwrap();
        let now = if reads.len() < self.switch_after { &self.bytes } else { &self.later };
        let start = offset as usize;
        let there = now.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(there);
        reads.push(offset..offset + buffer.len() as u64);
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
