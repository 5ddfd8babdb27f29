//! What is served, and what it has to read as.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use hexz_reader::{OpenOptions, Snapshot, StreamKind};

use crate::archive_writer::{self, ArchiveWriter, Piece, noise, text};

/// The bytes of an export.
pub(crate) type Content = Arc<Vec<u8>>;

/// The password of the encrypted archives.
const PASSWORD: &str = "correct horse battery staple";

const IMAGE: &str = "f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c";
const CHILD: &str = "bdfb933e575594c1e7909a1d8cac0836966fad767893806bd8303d0b2ce7c8d1";
const GRANDCHILD: &str = "b2bc3711e3005be4f34b835d6b3375c64674ad995ac3eb4065575e3ea8764433";
const TEXT: &str = "c12f9f46eb3393106b75ecbd89218fe2cca06d9d636d42dcc6ffeea1eeea015d";

/// What one identity loses on the way: nobody else reads it as "private".
pub(crate) const PRIVATE: &str = "private";
/// The archive that is replaced again and again.
pub(crate) const TURNING: &str = "turning.hxz";

/// The blocks of an archive that is written here, and of how many bytes each is. Two such don't
/// fit into the server's cache.
const BLOCKS: u64 = 1024;
const BLOCK: usize = 64 * 1024;
/// So few blocks on a page that pages of the index have to be read again, too.
const BLOCKS_PER_PAGE: usize = 16;

/// An export, and what it reads as.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) content: Content,
    /// Whether its disk fails now and then.
    pub(crate) is_faulty: bool,
}

pub(crate) struct Archives {
    /// Those that stay as they are.
    pub(crate) steady: Vec<Expected>,
    pub(crate) private: Expected,
    pub(crate) turning: Turning,
    /// What the server is given.
    pub(crate) arguments: Vec<String>,
}

/// The archive that is replaced: by two others, in turn.
pub(crate) struct Turning {
    folder: PathBuf,
    /// The stored bytes of either, and what they read as; their sizes tell them apart.
    sides: [(Vec<u8>, Content); 2],
    /// How often it was replaced; odd while that is being done.
    steps: Mutex<u64>,
}

impl Archives {
    /// Copies archives to that folder, and decodes them once.
    pub(crate) fn prepare(originals: &Path, folder: &Path) -> Result<Self> {
        let original = |name: &str| originals.join(name);
        let image = decoded(&original("base-zstd.hxz"), IMAGE)?;
        let child = decoded(&original("child-zstd.hxz"), CHILD)?;
        let grandchild = decoded(&original("grandchild-zstd.hxz"), GRANDCHILD)?;
        let prose = decoded(&original("text-dict-zstd.hxz"), TEXT)?;

        let disks = folder.join("disks");
        fs::create_dir(&disks)?;
        let mut arguments = Vec::new();
        let mut add = |name: &str, from: &str, content: &Content| -> Result<Expected> {
            let path = disks.join(name);
            fs::copy(original(from), &path).with_context(|| from.to_owned())?;
            arguments.push(path.display().to_string());
            let is_faulty = name.starts_with("faulty");
            Ok(Expected { name: name.to_owned(), content: Arc::clone(content), is_faulty })
        };
        let mut steady = vec![
            add("base-zstd.hxz", "base-zstd.hxz", &image)?,
            add("base-lz4.hxz", "base-lz4.hxz", &image)?,
            add("fixed-4k-zstd.hxz", "fixed-4k-zstd.hxz", &image)?,
            add("fixed-64k-zstd.hxz", "fixed-64k-zstd.hxz", &image)?,
            add("child-zstd.hxz", "child-zstd.hxz", &child)?,
            add("grandchild-zstd.hxz", "grandchild-zstd.hxz", &grandchild)?,
            add("text-dict-zstd.hxz", "text-dict-zstd.hxz", &prose)?,
        ];
        // Its blocks have no hashes, so that they aren't found in the cache as another's.
        steady.push(add("faulty-encrypted.hxz", "encrypted-zstd.hxz", &image)?);
        for (name, seeds) in [("big.hxz", 0..BLOCKS), ("faulty-big.hxz", BLOCKS..2 * BLOCKS)] {
            let path = disks.join(name);
            let content = write_big(&path, seeds);
            arguments.push(path.display().to_string());
            let is_faulty = name.starts_with("faulty");
            steady.push(Expected { name: name.to_owned(), content, is_faulty });
        }
        let private = Expected { name: PRIVATE.into(), content: child, is_faulty: false };
        arguments.push(format!("{PRIVATE}={}", disks.join("child-zstd.hxz").display()));

        let password = folder.join("password");
        crate::authority::replace(&password, PASSWORD)?;
        let turning = folder.join("turning");
        fs::create_dir(&turning)?;
        let sides = [
            (fs::read(original("base-zstd.hxz"))?, image),
            (fs::read(original("text-dict-zstd.hxz"))?, prose),
        ];
        arguments.extend(["--password-file".into(), password.display().to_string()]);
        arguments.extend(["--export-dir".into(), turning.display().to_string()]);
        let turning = Turning { folder: turning, sides, steps: Mutex::new(0) };
        turning.put()?;
        Ok(Self { steady, private, turning, arguments })
    }

    /// The steady archives on the disk that fails, or the others.
    pub(crate) fn steady_on(&self, faulty: bool) -> Vec<&Expected> {
        self.steady.iter().filter(|expected| expected.is_faulty == faulty).collect()
    }
}

impl Turning {
    /// Puts the other one in place.
    pub(crate) fn turn(&self) -> Result<()> {
        self.step();
        let replaced = self.put();
        self.step();
        replaced
    }

    fn put(&self) -> Result<()> {
        let new = self.folder.join("new.tmp");
        fs::write(&new, &self.side(self.steps().div_ceil(2)).0)?;
        Ok(fs::rename(new, self.folder.join(TURNING))?)
    }

    /// How often it was replaced; odd while that is being done.
    pub(crate) fn steps(&self) -> u64 {
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What somebody reads who began at `before`, and had chosen the export at `after`, and
    /// was told its size. `None` if that size is wrong.
    pub(crate) fn content(&self, before: u64, after: u64, size: u64) -> Option<Expected> {
        let possible = if before == after && before.is_multiple_of(2) {
            &self.sides[before as usize / 2 % 2..][..1]
        } else {
            &self.sides[..]
        };
        let (_, content) = possible.iter().find(|(_, content)| content.len() as u64 == size)?;
        let content = Arc::clone(content);
        Some(Expected { name: TURNING.into(), content, is_faulty: false })
    }

    fn side(&self, number: u64) -> &(Vec<u8>, Content) {
        &self.sides[number as usize % 2]
    }

    fn step(&self) {
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }
}

/// Writes an archive with a block for each seed: noise, zeros, and what compresses well.
fn write_big(path: &Path, seeds: Range<u64>) -> Content {
    let piece = |seed| match seed % 4 {
        0 => Piece::Data(noise(seed, BLOCK)),
        1 => Piece::Zeros(BLOCK as u32),
        _ => Piece::Data(text(seed, BLOCK)),
    };
    let main: Vec<Piece> = seeds.map(piece).collect();
    let content = Arc::new(archive_writer::image(&main));
    ArchiveWriter { main, blocks_per_page: BLOCKS_PER_PAGE, ..ArchiveWriter::default() }
        .write()
        .save(path);
    content
}

/// All bytes of an archive, which its known SHA-256 vouches for.
fn decoded(path: &Path, sha256: &str) -> Result<Content> {
    let snapshot = Snapshot::open(path, &OpenOptions::default())?;
    let mut bytes = vec![0; usize::try_from(snapshot.size(StreamKind::Main))?];
    snapshot.read_exact_at(StreamKind::Main, &mut bytes, 0)?;
    let sum = digest(&SHA256, &bytes);
    let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(sum == sha256, "{}: its SHA-256 is {sum}", path.display());
    Ok(Arc::new(bytes))
}
