//! Sources of archives other than files.

use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{FetchPriority, Stamp, Storage};

/// Schemes of the URLs of archives.
pub const URL_SCHEMES: [&str; 5] = ["s3", "gs", "az", "https", "http"];

/// Returns true if a path is the URL of an object, with a scheme in any case. `./s3:/...` names a
/// file.
pub fn is_url(path: &Path) -> bool {
    let scheme = path.as_os_str().to_str().and_then(|text| text.split_once("://"));
    scheme.is_some_and(|(scheme, _)| URL_SCHEMES.iter().any(|it| it.eq_ignore_ascii_case(scheme)))
}

/// Opens the objects of stores, by URL. All functions may wait for the store.
pub trait RemoteSource: Debug + Send + Sync {
    /// Opens an object.
    ///
    /// # Errors
    /// The object doesn't exist ([`io::ErrorKind::NotFound`]), or the store can't be used.
    fn open(&self, url: &Path) -> io::Result<Arc<dyn Storage>>;

    /// Returns the stamp of an object as far as it is known without a request; `None` if the
    /// object is known not to exist.
    fn stamp(&self, url: &Path) -> Option<Stamp>;

    /// Opens an object in a version that is known, without a request, if all that opening it reads is
    /// cached. The version may not be current. `None` if the object is open, or isn't known.
    fn open_known(&self, url: &Path) -> Option<Arc<dyn Storage>> {
        let _ = url;
        None
    }

    /// Opens a small object that belongs to an archive, and is read as a whole.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    fn open_side_file(&self, url: &Path, priority: FetchPriority) -> io::Result<Arc<dyn Storage>> {
        let _ = priority;
        self.open(url)
    }

    /// Returns true if an archive has been opened in a version that may not be current, so that
    /// nothing should be done with it that takes long.
    fn is_tentative(&self) -> bool {
        false
    }

    /// Returns true if the object has been opened before and can be opened without its store, as far
    /// as it is cached.
    fn is_known(&self, url: &Path) -> bool {
        let _ = url;
        false
    }

    /// Returns names and stamps of the objects in a folder.
    ///
    /// # Errors
    /// The folder can't be listed.
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, Stamp)>>;

    /// Returns true if a recent listing of its folder has an object, false if it doesn't have it.
    /// `None` if there is no recent listing. Makes no request.
    fn is_listed(&self, url: &Path) -> Option<bool> {
        let _ = url;
        None
    }
}

/// Failure of a remote read, inside an [`io::Error`].
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    /// Stable label for metrics, logs and programs.
    pub label: &'static str,
    /// What happened to which object, and what to do.
    pub message: String,
    /// True if the same read may succeed later.
    pub is_transient: bool,
    /// True if the store fails, or rejects requests because of the credentials or the clock. Neither
    /// says anything about the object.
    pub is_outage: bool,
}

impl RemoteError {
    /// Returns the remote failure inside an error, if there is one.
    pub(crate) fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_distinguished_from_paths() {
        for url in ["s3://b/k", "gs://b/k", "az://c/k", "https://h/p", "http://h:1/p", "S3://b"] {
            assert!(is_url(url.as_ref()), "{url}");
        }
        for path in ["", "a", "/s3://b", "./s3://b/k", "s3:/b", "ftp://h/p", "x=s3://b"] {
            assert!(!is_url(path.as_ref()), "{path}");
        }
    }
}
