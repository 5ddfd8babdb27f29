//! Detects changes of the files that a reload reads.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hexz_reader::storage::FileStamp;
use tokio::task::spawn_blocking;

use super::sandbox;
use crate::cli::ReloadableOptions;

/// Interval at which watched files are polled.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of polls after a change before the files are read. A writer that doesn't stop
/// can't delay the reload for longer.
const MAX_SETTLE_POLLS: u32 = 5;

/// Files that a reload reads, with their stamps; `None` for files that don't exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct WatchedFiles(Vec<(PathBuf, Option<FileStamp>)>);

impl WatchedFiles {
    /// Takes the stamps of the files that `options` name. `stamp` is that of the configuration
    /// file, and must have been taken before it was read.
    pub(super) fn new(
        config: Option<&Path>,
        stamp: Option<FileStamp>,
        options: &ReloadableOptions,
    ) -> Self {
        let config = config.map(|path| (path.to_owned(), stamp));
        let others = sandbox::policy_files(options).into_iter().map(with_stamp);
        Self(config.into_iter().chain(others).collect())
    }

    /// Returns the files that are new, or whose content may differ from `before`.
    pub(super) fn changed_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a Path> {
        let changed = self.0.iter().filter(|file| !before.0.contains(file));
        changed.map(|(path, _)| path.as_path())
    }

    /// Takes the stamps of the same files again, without blocking the runtime.
    pub(super) async fn current(&self) -> Self {
        let paths: Vec<PathBuf> = self.0.iter().map(|(path, _)| path.clone()).collect();
        let stamps = spawn_blocking(|| paths.into_iter().map(with_stamp).collect());
        Self(stamps.await.unwrap_or_default())
    }

    /// Waits until the files have changed, and then until they stop changing: related files are
    /// replaced one after another, and must match.
    pub(super) async fn changed(&self) {
        let mut last = self.clone();
        let mut polls = 0;
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let now = self.current().await;
            polls = if now == *self { 0 } else { polls + 1 };
            if (now == last && now != *self) || polls >= MAX_SETTLE_POLLS {
                return;
            }
            last = now;
        }
    }
}

fn with_stamp(path: PathBuf) -> (PathBuf, Option<FileStamp>) {
    let stamp = FileStamp::of(&path);
    (path, stamp)
}
