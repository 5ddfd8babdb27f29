//! Paths and URLs of archives and folders, with hints for those that are probably mistakes.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use hexz_exports::{NamedArchive, NamedArchiveError};
use hexz_reader::storage::{URL_SCHEMES, is_url};

/// Schemes of other programs, with what to write instead.
const FOREIGN_SCHEMES: [(&[&str], &str); 4] = [
    (&["s3a", "s3n"], "write s3://BUCKET/KEY"),
    (&["gcs", "google"], "Google Cloud Storage is gs://BUCKET/KEY"),
    (
        &["azure", "azblob", "abfs", "abfss", "wasb", "wasbs", "adl", "adls"],
        "Azure Blob Storage is az://CONTAINER/KEY, with --store-account",
    ),
    (&["file"], "a file is named by its path, without file://"),
];

/// Parses the path or URL of an archive.
pub(super) fn archive(text: &OsStr) -> Result<PathBuf, String> {
    check(Path::new(text))?;
    match NamedArchive::new("archive", text) {
        Err(error @ NamedArchiveError::Folder) => Err(format!("{error}: name an archive in it")),
        _ => Ok(PathBuf::from(text)),
    }
}

/// Parses the path or URL of a folder.
pub(super) fn folder(text: &OsStr) -> Result<PathBuf, String> {
    check(Path::new(text)).map(|()| PathBuf::from(text))
}

/// Parses an archive to serve, `PATH` or `NAME=PATH`.
pub(super) fn named_archive(text: &OsStr) -> Result<NamedArchive, String> {
    // A scheme that isn't supported may be followed by an equals sign.
    check(Path::new(text))?;
    let named = NamedArchive::parse(text).map_err(explain)?;
    check(&named.path)?;
    Ok(named)
}

/// Creates the entry of an archive that has its name from elsewhere.
pub(crate) fn archive_named(name: &str, path: &str) -> Result<NamedArchive, String> {
    check(Path::new(path))?;
    NamedArchive::new(name, path).map_err(explain)
}

fn explain(error: NamedArchiveError) -> String {
    match error {
        NamedArchiveError::Folder => {
            format!("{error}: serve the archives in it with --export-dir")
        }
        error => error.to_string(),
    }
}

/// Returns an error for a path that looks like a URL, but isn't one that is supported. A file or
/// folder of that name is used.
fn check(path: &Path) -> Result<(), String> {
    if is_url(path) {
        return if cfg!(feature = "remote") {
            Ok(())
        } else {
            Err("this program was built without support for URLs (feature \"remote\")".to_owned())
        };
    }
    let Some((scheme, rest)) = path.to_str().and_then(|text| text.split_once(":/")) else {
        return Ok(());
    };
    let is_scheme = |text: &str| {
        let others =
            |character: char| character.is_ascii_alphanumeric() || "+-.".contains(character);
        text.starts_with(|first: char| first.is_ascii_alphabetic()) && text.chars().all(others)
    };
    if !is_scheme(scheme) || path.exists() {
        return Ok(());
    }
    let is = |known: &&str| scheme.eq_ignore_ascii_case(known);
    let is_url = rest.starts_with('/');
    let foreign = FOREIGN_SCHEMES.iter().find(|(schemes, _)| schemes.iter().any(is));
    match (foreign, URL_SCHEMES.iter().find(|it| is(it))) {
        (Some((_, advice)), _) => Err((*advice).to_owned()),
        (None, Some(known)) => Err(format!("a URL has two slashes: {known}://")),
        (None, None) if is_url => {
            let all = URL_SCHEMES.map(|scheme| format!("{scheme}://")).join(", ");
            Err(format!("URLs start with one of {all}; there is no file of this name either"))
        }
        (None, None) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistaken_urls_get_advice() {
        for (path, advice) in [
            ("gcs://b/k", "gs://"),
            ("GCS:/b/k", "gs://"),
            ("azure://c/k", "az://"),
            ("abfss://c@a/k", "az://"),
            ("s3a://b/k", "s3://"),
            ("file:///srv/a.hxz", "without file://"),
            ("s3:/b/k", "two slashes: s3://"),
            ("HTTPS:/h/k", "two slashes: https://"),
            ("ftp://h/k=v", "s3://, gs://, az://, https://, http://"),
        ] {
            let error = named_archive(OsStr::new(path)).unwrap_err();
            assert!(error.contains(advice), "{path}: {error}");
            let error = named_archive(OsStr::new(&format!("web={path}"))).unwrap_err();
            assert!(error.contains(advice), "{path}: {error}");
            assert!(check(Path::new(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn paths_need_not_exist() {
        for path in ["a.hxz", "/none/a.hxz", "./gcs://b/k", "nas:/images/a.hxz", "a b://c", "://"] {
            assert_eq!(check(Path::new(path)), Ok(()), "{path}");
        }
    }

    #[cfg(feature = "remote")]
    #[test]
    fn schemes_are_accepted_in_any_case() {
        for url in ["s3://b/k", "S3://b/k", "GS://b/k", "Az://c/k", "HTTPS://h/k", "Http://h/k"] {
            assert_eq!(named_archive(OsStr::new(url)).unwrap().name, "k", "{url}");
        }
        let error = named_archive(OsStr::new("http://h/v7/?s3cret")).unwrap_err();
        assert!(error.contains("--export-dir") && !error.contains("s3cret"), "{error}");
    }
}
