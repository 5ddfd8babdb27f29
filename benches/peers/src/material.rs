//! What is served: an image with a file system, and the same as archive and as qcow2.

use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustls::ClientConfig;

use crate::load::PLACE;
use crate::measure::progress;
use crate::servers::client_tls;

/// The image's size, and how much of it are files of /usr, in bytes.
const IMAGE: u64 = 2 << 30;
const FILES: u64 = 960_000_000;

/// All that the servers and the client need.
pub(crate) struct Material {
    pub(crate) folder: PathBuf,
    pub(crate) hexz_nbd: PathBuf,
    pub(crate) hexz_peer: PathBuf,
    pub(crate) image: PathBuf,
    pub(crate) archive: PathBuf,
    pub(crate) qcow2: PathBuf,
    pub(crate) pki: PathBuf,
    pub(crate) client_tls: Arc<ClientConfig>,
    /// Where the image isn't zeros.
    pub(crate) places: Arc<[u32]>,
}

impl Material {
    /// Makes in `folder` what isn't there yet.
    pub(crate) fn make(folder: &Path, hexz_nbd: &Path, hexz_peer: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        // Servers may change their directory.
        let folder = &fs::canonicalize(folder)?;
        let [image, archive, qcow2, ca] =
            ["image.raw", "image.hxz", "image.qcow2", "ca"].map(|name| folder.join(name));
        once(&image, |to| make_image(folder, to))?;
        once(&archive, |to| run(Command::new(hexz_peer).arg("pack").arg(&image).arg(to)))?;
        let converted = once(&qcow2, |to| {
            let options = ["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"];
            run(Command::new("qemu-img").args(options).arg(&image).arg(to))
        });
        if let Err(error) = converted {
            eprintln!("without a qcow2: {error:#}");
        }
        once(&ca, |to| {
            let pki = || {
                let mut command = Command::new(hexz_nbd);
                command.arg("pki").arg("--dir").arg(to);
                command
            };
            run(pki().arg("init"))?;
            run(pki().args(["server", "localhost", "127.0.0.1"]))
        })?;
        let pki = ca.join("servers/localhost");
        // Cold means that nothing is decoded; no case is about how fast the disk is.
        for file in [&archive, &qcow2].into_iter().filter(|file| file.exists()) {
            std::io::copy(&mut fs::File::open(file)?, &mut std::io::sink())?;
        }
        let places = places(&image)?;
        let client_tls = client_tls(&pki, false)?;
        let (hexz_nbd, hexz_peer) = (hexz_nbd.to_owned(), hexz_peer.to_owned());
        let folder = folder.to_owned();
        Ok(Self { folder, hexz_nbd, hexz_peer, image, archive, qcow2, pki, client_tls, places })
    }
}

fn places(image: &Path) -> Result<Arc<[u32]>> {
    let mut image = BufReader::with_capacity(1 << 20, fs::File::open(image)?);
    let mut block = [0; PLACE as usize];
    let mut places = Vec::new();
    for place in 0..u32::try_from(IMAGE / PLACE)? {
        image.read_exact(&mut block)?;
        if block.iter().any(|&byte| byte != 0) {
            places.push(place);
        }
    }
    Ok(places.into())
}

/// Makes `path` under another name first, so that it is there whole or not at all.
fn once(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    progress(&format!("making {}", path.display()));
    let unfinished = path.with_extension("unfinished");
    if unfinished.is_dir() {
        fs::remove_dir_all(&unfinished)?;
    }
    make(&unfinished).with_context(|| format!("make {}", path.display()))?;
    fs::rename(&unfinished, path)?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} fails: {why}");
    Ok(())
}

/// An ext4 file system with the first files of /usr, by name.
fn make_image(folder: &Path, image: &Path) -> Result<()> {
    let tree = folder.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let mut left = FILES;
    copy_files(Path::new("/usr"), &tree, &mut left)?;
    ensure!(left < FILES / 20, "there are not enough files in /usr: {left} bytes are missing");
    let image_file = fs::File::create(image)?;
    image_file.set_len(IMAGE)?;
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(image))?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

fn copy_files(from: &Path, to: &Path, left: &mut u64) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    fs::create_dir_all(to)?;
    for entry in entries {
        let (kind, name) = (entry.file_type()?, entry.file_name());
        if kind.is_dir() {
            copy_files(&entry.path(), &to.join(name), left)?;
        } else if kind.is_file() && entry.metadata()?.len() <= *left {
            // What only root can read isn't needed.
            if let Ok(copied) = fs::copy(entry.path(), to.join(name)) {
                *left -= copied;
            }
        }
    }
    Ok(())
}
