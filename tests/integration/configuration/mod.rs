//! The configuration file: what counts of it, what is said of it, and what SIGHUP changes.

mod check;
mod control;
mod precedence;
mod reload;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::archive;
use crate::support::server::{Builder, Server};

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";

/// A folder with a configuration file, archives and whatever else it names.
struct Site {
    folder: TempDir,
}

impl Site {
    fn new(text: &str) -> Self {
        let site = Self { folder: tempfile::tempdir().unwrap() };
        // Not every user may look into a temporary folder.
        fs::set_permissions(site.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        site.say(text);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self) -> PathBuf {
        self.path("hexz-nbd.toml")
    }

    /// Writes the configuration file, in one step. `{}` is this folder, and `{archives}` that of
    /// the archives in the repository.
    fn say(&self, text: &str) {
        let archives = archive("");
        let text = text.replace("{archives}", archives.to_str().unwrap().trim_end_matches('/'));
        let text = text.replace("{}", self.folder.path().to_str().unwrap());
        replace(&self.file(), &text);
    }

    /// One of the archives in the repository, under another name.
    fn copy(&self, from: &str, to: &str) -> PathBuf {
        let to = self.path(to);
        fs::copy(archive(from), &to).unwrap();
        to
    }

    /// A server with this file, and with what tests usually have on the command line.
    fn server(&self) -> Builder {
        Server::builder().arg("--config").arg(self.file())
    }

    /// A server with nothing but this file.
    fn alone(&self) -> Builder {
        self.server().bare()
    }
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}
