//! Loads the password, keys and digests that options name, and opens archives with them.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hexz_exports::{Catalog, CatalogError, FolderError, FolderFault, SnapshotExport};
use hexz_reader::storage::is_url;
use hexz_reader::{Digests, DigestsError, OpenOptions, PasswordSource, VerifyKey, VerifyKeyError};
use nbd_server::Export;
use nbd_telemetry::escape;

#[cfg(feature = "remote")]
use crate::cli::SecretUrls;
use crate::cli::{OpenArchiveOptions, SnapshotOptions, StoreOptions};
use crate::exit_status::{self, ExitStatus, Failure};
use crate::hints;
use crate::service::password;
#[cfg(feature = "remote")]
use crate::service::remote::{self, OFFLINE_MEMORY};

/// Maximum length of a key file, in bytes.
const MAX_KEY_FILE: u64 = 64 * 1024;
/// Maximum length of a list of digests, in bytes; enough for some 100,000 archives.
const MAX_DIGEST_LIST: u64 = 16 * 1024 * 1024;

/// Reason for which a key or a digest can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error("invalid key {:?} in --verify-key: {error}", escape::path(.name))]
    Key { name: OsString, error: VerifyKeyError },
    #[error("can't read the key file {:?} of --verify-key: {error}", escape::path(.name))]
    KeyFile { name: OsString, error: io::Error },
    #[error("invalid --digest {:?}: {error}", escape::path(.name))]
    Digest { name: OsString, error: DigestsError },
    #[error(
        "can't read the list {:?} of --digest: {error} (a single digest is NAME=BLAKE3, with 64 \
         hexadecimal digits)",
        escape::path(.name)
    )]
    DigestFile { name: OsString, error: io::Error },
}

impl ExitStatus for TrustError {
    fn exit_status(&self) -> u8 {
        exit_status::ARCHIVE
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Key { .. } => "invalid_key",
            Self::KeyFile { .. } => "unreadable_key",
            Self::Digest { .. } => "invalid_digest",
            Self::DigestFile { .. } => "unreadable_digests",
        }
    }
}

impl ExitStatus for CatalogError {
    fn exit_status(&self) -> u8 {
        exit_status::USAGE
    }

    fn label(&self) -> &'static str {
        Self::label(self)
    }
}

impl ExitStatus for FolderError {
    fn exit_status(&self) -> u8 {
        exit_status::ARCHIVE
    }

    fn label(&self) -> &'static str {
        self.cause.label()
    }
}

impl ExitStatus for hexz_reader::Error {
    fn exit_status(&self) -> u8 {
        exit_status::ARCHIVE
    }

    fn label(&self) -> &'static str {
        self.kind.label()
    }

    fn hint(&self) -> Option<&'static str> {
        hints::of_error(&self.kind)
    }
}

/// Returns the options with which archives are opened.
pub(crate) fn options(opening: &OpenArchiveOptions) -> Result<OpenOptions, Failure> {
    let password = password::password_source(opening.password_file.as_deref())?;
    Ok(with_password(opening, password)?)
}

/// Returns the same options, with a password that has already been loaded.
pub(crate) fn with_password(
    opening: &OpenArchiveOptions,
    password: Option<PasswordSource>,
) -> Result<OpenOptions, TrustError> {
    Ok(OpenOptions {
        parent_dirs: opening.parent_dir.clone(),
        allow_parent_anywhere: opening.allow_parent_anywhere,
        password,
        raw: opening.raw,
        max_key_iterations: opening.max_key_iterations,
        reference_choices: Arc::from(opening.resolve_references.as_slice()),
        zero_uncovered: opening.zero_uncovered,
        ..load_keys_and_digests(opening)?
    })
}

/// Returns the same options with the stores of `paths`, from which queries are removed, and of the
/// folders with parents. For commands that read archives without serving them.
#[cfg(feature = "remote")]
pub(crate) fn with_stores(
    mut open: OpenOptions,
    paths: &mut [PathBuf],
    stores: &StoreOptions,
) -> Result<OpenOptions, Failure> {
    let secret_urls = SecretUrls::take_from(&mut *paths, &mut open.parent_dirs);
    let stores = StoreOptions { secret_urls, ..stores.clone() };
    let urls = paths.iter().chain(&open.parent_dirs).map(PathBuf::as_path);
    let urls = urls.filter(|path| is_url(path));
    let remote = remote::connect_directly(&stores, urls, OFFLINE_MEMORY)?;
    open.remote = remote;
    Ok(open)
}

#[cfg(not(feature = "remote"))]
pub(crate) fn with_stores(
    open: OpenOptions,
    _: &mut [PathBuf],
    _: &StoreOptions,
) -> Result<OpenOptions, Failure> {
    Ok(open)
}

/// Returns true if keys or digests restrict which archives may be opened.
pub(crate) fn has_keys_or_digests(opening: &OpenArchiveOptions) -> bool {
    !opening.verify_key.is_empty() || !opening.digest.is_empty()
}

/// Loads the keys and digests that archives are verified with; the other options keep their
/// defaults.
pub(crate) fn load_keys_and_digests(
    opening: &OpenArchiveOptions,
) -> Result<OpenOptions, TrustError> {
    let keys: Result<Vec<_>, TrustError> =
        opening.verify_key.iter().map(|key| load_key(key)).collect();
    Ok(OpenOptions {
        verify_keys: Arc::from(keys?),
        digests: load_digests(opening)?.map(Arc::new),
        ..OpenOptions::default()
    })
}

/// Returns the arguments of the key and digest options that name files.
pub(crate) fn key_and_digest_files(opening: &OpenArchiveOptions) -> Vec<PathBuf> {
    let is_key =
        |text: &&OsString| text.to_str().is_none_or(|text| text.parse::<VerifyKey>().is_err());
    let keys = opening.verify_key.iter().filter(is_key);
    let lists = opening.digest.iter().filter(|text| !Digests::is_entry(text));
    keys.chain(lists).map(PathBuf::from).collect()
}

/// Checks that the export folder exists, which the program can't start without, before the sandbox
/// warns that it won't be readable. Whether it can be read is known only inside the sandbox.
pub(crate) fn check_folder_exists(options: &SnapshotOptions) -> Result<(), FolderError> {
    let folder = options.export_dir.as_deref().filter(|path| !is_url(path));
    match folder.map(|path| (path, path.metadata())) {
        Some((path, Err(error))) if error.kind() == io::ErrorKind::NotFound => {
            Err(FolderError { path: path.to_owned(), cause: FolderFault::Missing, error })
        }
        _ => Ok(()),
    }
}

/// Opens the named archives, and returns a description of what will be served.
pub(crate) async fn open(catalog: &Catalog, options: &SnapshotOptions) -> Result<String, Failure> {
    let (exports, mut failed) = catalog.open_named().await;
    let nothing_is_left = exports.is_empty() && options.export_dir.is_none();
    // A store that is down may be up again when a client asks.
    let is_fatal =
        |error: &hexz_reader::Error| options.strict || (nothing_is_left && !error.is_store_down());
    let fatal = failed.iter().rposition(is_fatal).map(|position| failed.remove(position));
    for error in failed {
        let hint = hints::of_error(&error.kind);
        tracing::error!(reason = error.label(), hint, "archive skipped: {error}");
    }
    if let Some(error) = fatal {
        return Err(error.into());
    }
    if let Some(name) = options.default_export.as_deref()
        && !catalog.has(name).await
    {
        warn_no_default(catalog, name).await;
    }
    exports.iter().for_each(warn_unaligned_size);
    let named = exports
        .iter()
        .map(|export| format!("{} ({})", escape::name(export.name()), export.description()));
    let folder = options.export_dir.as_deref();
    let in_folder = match catalog.read_folder().await {
        Ok(names) => Some(names),
        Err(error) if can_be_listed_later(&error, !exports.is_empty(), options) => {
            tracing::warn!(
                reason = error.label(),
                "{error}; the folder is listed when its store responds, and until then, clients \
                 have to know the names of the archives in it"
            );
            None
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(folder) = folder
        && in_folder.is_some_and(|names| names.is_empty())
    {
        tracing::warn!(
            reason = "folder_empty",
            "export folder {} has no archives yet: no file is called .hxz or .hexz",
            escape::path(folder)
        );
    }
    let folder = folder.map(|folder| format!("every archive in {}", escape::path(folder)));
    let all: Vec<String> = named.chain(folder).collect();
    // The stores of all archives are down.
    Ok(if all.is_empty() { "no archive yet".to_owned() } else { all.join(", ") })
}

/// Returns true if the program is of use although it can't list the export folder: the store may be
/// up again soon, or other archives are served.
fn can_be_listed_later(error: &FolderError, has_others: bool, options: &SnapshotOptions) -> bool {
    !options.strict && (error.is_store_down() || (has_others && error.is_outage()))
}

/// Warns that clients that name no export are refused, and says why.
async fn warn_no_default(catalog: &Catalog, name: &str) {
    if catalog.may_have(name) {
        tracing::warn!(
            reason = "default_export_missing",
            "default export {:?} not found; clients that name no export are refused until it exists",
            escape::name(name)
        );
        return;
    }
    let mut alike = None;
    for extension in ["hxz", "hexz"] {
        let file = format!("{name}.{extension}");
        if catalog.has(&file).await {
            alike = Some(format!("; did you mean {:?}?", escape::name(&file)));
            break;
        }
    }
    tracing::warn!(
        reason = "default_export_impossible",
        "default export {:?} can't exist, since exports of a folder are called like their files, \
         with .hxz or .hexz; clients that name no export are refused{}",
        escape::name(name),
        alike.unwrap_or_default()
    );
}

fn warn_unaligned_size(export: &SnapshotExport) {
    const SECTOR: u64 = 512;
    if !export.size().is_multiple_of(SECTOR) {
        tracing::warn!(
            reason = "unaligned_size",
            "{}: the size of {} bytes is not a multiple of 512; some clients, such as the Linux \
             kernel, don't show the last {} bytes",
            escape::name(export.name()),
            export.size(),
            export.size() % SECTOR,
        );
    }
}

/// Parses a key from its hexadecimal digits, or reads it from a file.
fn load_key(text: &OsStr) -> Result<VerifyKey, TrustError> {
    let name = || text.to_owned();
    if let Some(key) = text.to_str().and_then(|text| text.parse().ok()) {
        return Ok(key);
    }
    let content = read(Path::new(text), MAX_KEY_FILE)
        .map_err(|error| TrustError::KeyFile { name: name(), error })?;
    VerifyKey::from_file_content(&content).map_err(|error| TrustError::Key { name: name(), error })
}

fn load_digests(opening: &OpenArchiveOptions) -> Result<Option<Digests>, TrustError> {
    if opening.digest.is_empty() {
        return Ok(None);
    }
    let mut digests = Digests::default();
    for text in &opening.digest {
        let name = || text.to_owned();
        let added = if Digests::is_entry(text) {
            digests.add_entry(text)
        } else {
            let list = read(Path::new(text), MAX_DIGEST_LIST)
                .map_err(|error| TrustError::DigestFile { name: name(), error })?;
            digests.add_list(&list)
        };
        added.map_err(|error| TrustError::Digest { name: name(), error })?;
    }
    Ok(Some(digests))
}

fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        let message = format!("the file has more than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(content)
}
