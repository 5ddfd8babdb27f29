//! The CA's folder: its layout, and atomic creation of the files in it.
//!
//! ```text
//! ca-cert.pem  ca-key.pem  crl.pem     the CA, and what it has revoked
//! issued/SERIAL.pem                    a copy of each certificate
//! servers/NAME/                        what a server needs
//! clients/NAME/                        what a client needs
//! .lock                                locked while files are created
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nbd_gateway::tls::check_not_exposed;
use tempfile::{NamedTempFile, TempDir};
use zeroize::Zeroizing;

use super::PkiError;
use super::authority::{CertificateAuthority, IssuedCertificate};
use super::certificate::{CertificateInfo, CertificateKind};
use super::inventory::Inventory;
use super::names::SubjectName;
use super::revocations::Revocations;
use crate::exit_status::ExitStatus;

pub(crate) const CA_CERTIFICATE: &str = "ca-cert.pem";
pub(super) const CA_KEY: &str = "ca-key.pem";
pub(super) const REVOCATION_LIST: &str = "crl.pem";
const ISSUED: &str = "issued";
const LOCK: &str = ".lock";
/// Prefix of files and folders that aren't complete yet.
const TEMPORARY_PREFIX: &str = ".new-";

const PUBLIC: u32 = 0o644;
const SECRET: u32 = 0o600;
const SECRET_FOLDER: u32 = 0o700;

/// Maximum size of a file, in bytes: a list of some 300,000 revoked certificates.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Time to wait for another process to release the lock; it normally takes milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The folder of a CA.
#[derive(Debug)]
pub(super) struct CaFolder {
    path: PathBuf,
}

/// Exclusive lock on the folder, held as long as this value exists.
pub(super) struct FolderLock(#[expect(dead_code, reason = "closing it unlocks")] File);

/// Inventory of the folder.
pub(super) struct FolderContents {
    pub(super) certificate: bool,
    pub(super) key: bool,
    pub(super) revocations: bool,
    pub(super) issued: bool,
}

impl CaFolder {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub(super) fn root(&self) -> &Path {
        &self.path
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Returns the folder of the server or client with the given name.
    pub(super) fn bundle_path(&self, kind: CertificateKind, name: &SubjectName) -> PathBuf {
        self.path.join(format!("{kind}s")).join(name.folder_name())
    }

    /// Creates the folder if it doesn't exist, accessible only to its owner.
    pub(super) fn create(&self) -> Result<(), PkiError> {
        fs::create_dir_all(parent_folder(&self.path))
            .and_then(|()| make_folder(&self.path))
            .map_err(PkiError::io("create", &self.path))
    }

    /// Waits for exclusive access to the folder, then removes what interrupted processes left
    /// unfinished.
    pub(super) fn lock(&self) -> Result<FolderLock, PkiError> {
        let path = self.path(LOCK);
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).mode(SECRET).open(&path);
        let file = file.map_err(PkiError::io("open", &path))?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => return Err(PkiError::Busy(self.path.clone())),
                Err(TryLockError::Error(error)) => return Err(PkiError::io("lock", &path)(error)),
            }
        }
        self.remove_temporary().map_err(PkiError::io("clean up", &self.path))?;
        Ok(FolderLock(file))
    }

    pub(super) fn contents(&self) -> Result<FolderContents, PkiError> {
        let is_there = |name: &str| fs::symlink_metadata(self.path(name)).is_ok();
        Ok(FolderContents {
            certificate: is_there(CA_CERTIFICATE),
            key: is_there(CA_KEY),
            revocations: is_there(REVOCATION_LIST),
            issued: !self.issued_files()?.is_empty(),
        })
    }

    /// Reads the CA's private key, and checks that other users can't read it.
    pub(super) fn read_key(&self) -> Result<Zeroizing<String>, PkiError> {
        let path = self.path(CA_KEY);
        let key = Zeroizing::new(self.read(CA_KEY)?);
        check_not_exposed(&path)
            .map_err(|problem| PkiError::file(&path, "exposed_key", problem.to_string()))?;
        match std::str::from_utf8(&key) {
            Ok(text) => Ok(Zeroizing::new(text.to_owned())),
            Err(_) => Err(PkiError::file(&path, "unusable_key", "it has no key in PEM format")),
        }
    }

    pub(super) fn authority(&self) -> Result<CertificateAuthority, PkiError> {
        let certificate = self.read(CA_CERTIFICATE)?;
        let key = self.read_key()?;
        CertificateAuthority::load(
            (&certificate, &self.path(CA_CERTIFICATE)),
            (&key, &self.path(CA_KEY)),
        )
    }

    /// Reads the CA's certificate; the private key may be stored elsewhere.
    pub(super) fn authority_certificate(&self) -> Result<CertificateInfo, PkiError> {
        CertificateInfo::from_pem(&self.read(CA_CERTIFICATE)?, &self.path(CA_CERTIFICATE))
    }

    pub(super) fn revocations(&self, authority: &CertificateInfo) -> Result<Revocations, PkiError> {
        Revocations::from_pem(&self.read(REVOCATION_LIST)?, &self.path(REVOCATION_LIST), authority)
    }

    /// Reads all certificates and what has been revoked of them.
    pub(super) fn inventory(&self, authority: &CertificateInfo) -> Result<Inventory, PkiError> {
        let (issued, revocations) = (self.issued()?, self.revocations(authority)?);
        Ok(Inventory { issued, revocations, now: SystemTime::now() })
    }

    /// Reads the certificate in the folder of a server or client; `None` if there is none.
    pub(super) fn bundle_certificate(
        &self,
        bundle: &Path,
        kind: CertificateKind,
    ) -> Option<CertificateInfo> {
        let path = bundle.join(format!("{kind}-cert.pem"));
        CertificateInfo::from_pem(&read(&path).ok()?, &path).ok()
    }

    /// Reads all certificates ever issued, sorted by expiry, the earliest first.
    pub(super) fn issued(&self) -> Result<Vec<CertificateInfo>, PkiError> {
        let mut issued = Vec::new();
        for path in self.issued_files()? {
            match read(&path).and_then(|pem| CertificateInfo::from_pem(&pem, &path)) {
                Ok(certificate) => issued.push(certificate),
                Err(error) => {
                    tracing::warn!(reason = error.label(), "certificate skipped: {error}");
                }
            }
        }
        // Those of the same second by name, so that the order is always the same.
        issued.sort_by_cached_key(|certificate| {
            (certificate.not_after, certificate.names_for_display(), certificate.not_before)
        });
        Ok(issued)
    }

    pub(super) fn write_key(&self, authority: &CertificateAuthority) -> Result<(), PkiError> {
        write_new(&self.path(CA_KEY), &authority.key(), SECRET)
    }

    pub(super) fn write_certificate(
        &self,
        authority: &CertificateAuthority,
    ) -> Result<(), PkiError> {
        write_new(&self.path(CA_CERTIFICATE), &authority.pem, PUBLIC)
    }

    pub(super) fn write_first_revocations(&self, pem: &str) -> Result<(), PkiError> {
        write_new(&self.path(REVOCATION_LIST), pem, PUBLIC)
    }

    /// Replaces the revocation list atomically.
    pub(super) fn replace_revocations(&self, pem: &str) -> Result<(), PkiError> {
        let path = self.path(REVOCATION_LIST);
        write_temporary(&path, pem, PUBLIC)
            .and_then(|file| Ok(file.persist(&path)?))
            .and_then(|_| sync_folder(&self.path))
            .map_err(PkiError::io("replace", &path))
    }

    /// Stores a copy of a certificate, so that it can be revoked even if the original is lost.
    pub(super) fn record_issued(&self, issued: &IssuedCertificate) -> Result<(), PkiError> {
        let folder = self.path(ISSUED);
        make_folder(&folder).map_err(PkiError::io("create", &folder))?;
        let name = format!("{}.pem", issued.certificate.serial);
        write_new(&folder.join(name), &issued.pem, PUBLIC)
    }

    /// Writes a folder with the certificate, its key and the CA's certificate, atomically.
    pub(super) fn write_bundle(
        &self,
        folder: &Path,
        authority: &CertificateAuthority,
        issued: &IssuedCertificate,
    ) -> Result<(), PkiError> {
        let parent = parent_folder(folder);
        make_folder(parent).map_err(PkiError::io("create", parent))?;
        let unfinished = temporary_bundle(parent, authority, issued)?;
        // Existing content is never replaced: renaming to a non-empty folder fails.
        fs::rename(unfinished.path(), folder)
            .and_then(|()| sync_folder(parent))
            .map_err(PkiError::io("create", folder))?;
        // The temporary name no longer exists, so there is nothing to remove.
        drop(unfinished.keep());
        Ok(())
    }

    /// Replaces the certificate, its key and the CA's certificate in a folder. The folder itself
    /// stays: it may be mounted, or the only one that a sandboxed program can read. Each file is
    /// replaced atomically, and keeps owner and permissions.
    pub(super) fn replace_bundle(
        &self,
        folder: &Path,
        authority: &CertificateAuthority,
        issued: &IssuedCertificate,
    ) -> Result<(), PkiError> {
        let parent = parent_folder(folder);
        let complete = temporary_bundle(parent, authority, issued)?;
        // The key and the certificate don't match in between, so that nothing else is done there.
        let names = bundle_files(issued.certificate.kind);
        for name in &names {
            let (new, old) = (complete.path().join(name), folder.join(name));
            copy_access(&old, &new).map_err(PkiError::io("replace", &old))?;
        }
        for name in &names {
            let old = folder.join(name);
            fs::rename(complete.path().join(name), &old).map_err(PkiError::io("replace", &old))?;
        }
        sync_folder(folder).map_err(PkiError::io("replace", folder))
    }

    fn issued_files(&self) -> Result<Vec<PathBuf>, PkiError> {
        let folder = self.path(ISSUED);
        let files = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed.and_then(|entries| {
                entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()
            }),
        };
        let files = files.map_err(PkiError::io("list", &folder))?;
        Ok(files
            .into_iter()
            .filter(|path| path.extension().is_some_and(|it| it == "pem"))
            .collect())
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, PkiError> {
        let path = self.path(name);
        if name == CA_CERTIFICATE && !path.exists() {
            return Err(PkiError::NoAuthority(self.path.clone()));
        }
        read(&path)
    }

    fn remove_temporary(&self) -> io::Result<()> {
        for folder in [".", ISSUED, "servers", "clients"] {
            let entries = match fs::read_dir(self.path.join(folder)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if !entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
                    continue;
                }
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        Ok(())
    }
}

/// Writes the files of a bundle into a new folder in `parent`, which is removed unless it is kept.
fn temporary_bundle(
    parent: &Path,
    authority: &CertificateAuthority,
    issued: &IssuedCertificate,
) -> Result<TempDir, PkiError> {
    let folder = tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .permissions(Permissions::from_mode(SECRET_FOLDER))
        .tempdir_in(parent)
        .map_err(PkiError::io("write to", parent))?;
    write_files(folder.path(), authority, issued)?;
    Ok(folder)
}

/// Writes the files that libnbd and qemu expect in a folder: `ca-cert.pem`, with `server-cert.pem`
/// and `server-key.pem` for a server, or `client-cert.pem` and `client-key.pem` for a client.
pub(crate) fn write_files(
    folder: &Path,
    authority: &CertificateAuthority,
    issued: &IssuedCertificate,
) -> Result<(), PkiError> {
    let [ca, certificate, key] = bundle_files(issued.certificate.kind);
    write_new(&folder.join(ca), &authority.pem, PUBLIC)?;
    write_new(&folder.join(certificate), &issued.pem, PUBLIC)?;
    write_new(&folder.join(key), &issued.key, SECRET)
}

/// Returns the names of the CA's certificate, of the certificate and of its key.
fn bundle_files(kind: CertificateKind) -> [String; 3] {
    [CA_CERTIFICATE.to_owned(), format!("{kind}-cert.pem"), format!("{kind}-key.pem")]
}

/// Gives a new file the owner and the permissions of the one that it will replace, if there is one.
fn copy_access(old: &Path, new: &Path) -> io::Result<()> {
    let old = match fs::metadata(old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        old => old?,
    };
    let now = fs::metadata(new)?;
    if (now.uid(), now.gid()) != (old.uid(), old.gid()) {
        chown(new, Some(old.uid()), Some(old.gid()))?;
    }
    fs::set_permissions(new, old.permissions())
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let mut content = Vec::new();
    let file = File::open(path).map_err(PkiError::io("read", path))?;
    let length = file.take(MAX_FILE + 1).read_to_end(&mut content);
    match length.map_err(PkiError::io("read", path))? {
        length if length as u64 > MAX_FILE => {
            Err(PkiError::file(path, "too_long", "it is longer than 16 MiB"))
        }
        _ => Ok(content),
    }
}

/// Creates a file atomically; fails if it exists.
fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), PkiError> {
    write_temporary(path, content, mode)
        .and_then(|file| Ok(file.persist_noclobber(path)?))
        .and_then(|_| sync_folder(parent_folder(path)))
        .map_err(PkiError::io("write", path))
}

/// Writes the content to a temporary file in the same folder, and syncs it to disk.
fn write_temporary(path: &Path, content: &str, mode: u32) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .permissions(Permissions::from_mode(SECRET))
        .tempfile_in(parent_folder(path))?;
    file.write_all(content.as_bytes())?;
    // The mode must not depend on the umask.
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn make_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(SECRET_FOLDER).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.and_then(|()| sync_folder(parent_folder(path))),
    }
}

/// Returns the parent folder, which may be the current one.
fn parent_folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Syncs a folder, so that new names in it are on disk.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
