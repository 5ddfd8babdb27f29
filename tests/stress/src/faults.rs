//! The disk that now and then can't be read: a library that is preloaded into the server, and
//! the file by which it is told how often.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The preloaded library.
const SOURCE: &str = include_str!("eio.c");

/// For how long after the disk has become well again errors may still arrive: what was read
/// before may have been on its way.
const GRACE: Duration = Duration::from_secs(2);

pub(crate) struct Faults {
    pub(crate) library: PathBuf,
    pub(crate) control: PathBuf,
    file: File,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Ill,
    /// Since then, or it always was.
    Well(Option<Instant>),
}

impl Faults {
    /// Builds the library in that folder.
    pub(crate) fn build(folder: &Path) -> Result<Self> {
        let path = |name: &str| folder.join(name);
        fs::write(path("eio.c"), SOURCE)?;
        let (library, control) = (path("eio.so"), path("eio.control"));
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .args([&library, &path("eio.c")])
            .arg("-ldl")
            .status()
            .context("there is no C compiler")?;
        ensure!(built.success(), "{SOURCE}: it can't be compiled");
        fs::write(&control, [0; 24])?;
        let file = File::options().read(true).write(true).open(&control)?;
        Ok(Self { library, control, file, state: Mutex::new(State::Well(None)) })
    }

    /// From now on every so many'th read fails; 0 is none.
    pub(crate) fn set(&self, every: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = if every > 0 { State::Ill } else { State::Well(Some(Instant::now())) };
        Ok(self.file.write_all_at(&every.to_ne_bytes(), 0)?)
    }

    /// Whether a read that began then may have failed.
    pub(crate) fn may_have_failed(&self, began: Instant) -> bool {
        match *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Ill => true,
            State::Well(since) => since.is_some_and(|since| began < since + GRACE),
        }
    }

    /// How many reads there were of files on that disk, and how many of them failed.
    pub(crate) fn counts(&self) -> Result<(u64, u64)> {
        let mut counts = [[0; 8]; 2];
        self.file.read_exact_at(counts.as_flattened_mut(), 8)?;
        let [reads, failed] = counts.map(u64::from_ne_bytes);
        Ok((reads, failed))
    }
}
