//! Objects: where their bytes are, and what identifies a version of one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use bytes::Bytes;
use parking_lot::RwLock;

use crate::encoding::hex;

/// One version of an object.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub(crate) content: Content,
    pub(crate) length: u64,
    pub(crate) modified: SystemTime,
    /// Entity tag, with its quotation marks.
    pub(crate) etag: String,
}

#[derive(Debug, Clone)]
pub(crate) enum Content {
    Memory(Bytes),
    File(Arc<File>),
}

impl Object {
    /// Creates an object in memory. Its tag is a hash of its bytes.
    pub(crate) fn new(bytes: Bytes) -> Self {
        let hash = digest::digest(&digest::SHA256, &bytes);
        let etag = format!("\"{}\"", hex(hash.as_ref().get(..16).unwrap_or_default()));
        let (length, modified) = (bytes.len() as u64, SystemTime::now());
        Self { content: Content::Memory(bytes), length, modified, etag }
    }

    /// Opens a file. Its tag is derived from its time and length, as nginx's is.
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let (metadata, modified) = (file.metadata()?, file.metadata()?.modified()?);
        if !metadata.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let since = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let length = metadata.len();
        let etag = format!("\"{:x}-{length:x}\"", since.as_nanos());
        Ok(Self { content: Content::File(Arc::new(file)), length, modified, etag })
    }

    /// Reads `length` bytes at `offset`, which lie inside the object.
    pub(crate) fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        match &self.content {
            Content::Memory(bytes) => {
                let start = usize::try_from(offset).map_err(io::Error::other)?;
                let end = start.saturating_add(length);
                if end > bytes.len() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(bytes.slice(start..end))
            }
            Content::File(file) => {
                let mut buffer = vec![0; length];
                file.read_exact_at(&mut buffer, offset)?;
                Ok(buffer.into())
            }
        }
    }
}

/// Objects by key, in memory and in a folder. Keys are paths such as `bucket/folder/name`.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    memory: RwLock<BTreeMap<String, Object>>,
    folder: Option<PathBuf>,
}

impl Objects {
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        Self { memory: RwLock::default(), folder }
    }

    pub(crate) fn insert(&self, key: &str, object: Object) {
        self.memory.write().insert(key.trim_start_matches('/').to_owned(), object);
    }

    pub(crate) fn remove(&self, key: &str) -> bool {
        self.memory.write().remove(key.trim_start_matches('/')).is_some()
    }

    /// Returns the current version of an object; those in memory take precedence.
    pub(crate) fn get(&self, key: &str) -> Option<Object> {
        if let Some(object) = self.memory.read().get(key) {
            return Some(object.clone());
        }
        let is_plain = |part| matches!(part, Component::Normal(_));
        let folder = self.folder.as_ref()?;
        let path = Path::new(key);
        path.components().all(is_plain).then(|| Object::open(&folder.join(path)).ok()).flatten()
    }

    /// Returns all objects whose key starts with `prefix`, by key.
    pub(crate) fn list(&self, prefix: &str) -> BTreeMap<String, Object> {
        let mut found = BTreeMap::new();
        if let Some(folder) = &self.folder {
            collect(folder, "", &mut found);
        }
        found.extend(self.memory.read().iter().map(|(key, object)| (key.clone(), object.clone())));
        found.retain(|key, _| key.starts_with(prefix));
        found
    }
}

/// Adds all files below a folder. Those that can't be read are left out.
fn collect(folder: &Path, prefix: &str, found: &mut BTreeMap<String, Object>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (key, path) = (format!("{prefix}{name}"), entry.path());
        if path.is_dir() {
            collect(&path, &format!("{key}/"), found);
        } else if let Ok(object) = Object::open(&path) {
            found.insert(key, object);
        }
    }
}
