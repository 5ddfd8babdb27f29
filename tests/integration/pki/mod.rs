//! `hexz-nbd pki`, by what openssl and the real clients make of its certificates.

mod certificates;
mod clients;
mod init;
mod renew;
mod revoke;
mod season;
mod show;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::clients::{Said, run};
use crate::support::server::{Ended, run as run_binary};

/// The page that lists the labels.
const DOCUMENTED: &str = include_str!("../../../docs/troubleshooting.md");

/// A CA's folder. It goes when this is dropped.
struct Ca {
    // The folder is made inside it.
    _outside: TempDir,
    folder: PathBuf,
}

impl Ca {
    /// A folder that isn't there yet.
    fn nowhere() -> Self {
        Self::nowhere_called("pki")
    }

    fn nowhere_called(name: &str) -> Self {
        let outside = tempfile::tempdir().unwrap();
        let folder = outside.path().join(name);
        Self { _outside: outside, folder }
    }

    fn new() -> Self {
        let ca = Self::nowhere();
        ca.make(["init"]);
        ca
    }

    fn run<const N: usize>(&self, args: [&str; N]) -> Ended {
        let dir = self.folder.to_str().unwrap();
        run_binary(["pki", "--dir", dir].into_iter().chain(args))
    }

    /// Runs it; it must succeed. Returns what it said.
    fn make<const N: usize>(&self, args: [&str; N]) -> String {
        let ended = self.run(args);
        assert_eq!(ended.code, Some(0), "{args:?}: {}", ended.stderr);
        ended.stdout
    }

    /// Runs it; it must fail for that reason. Returns what it logged.
    fn fail<const N: usize>(&self, args: [&str; N], reason: &str) -> String {
        let ended = self.run(args);
        let code = if reason == "usage" { 2 } else { 1 };
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{}", ended.stderr);
        let label = format!("reason=\"{reason}\"");
        assert!(ended.stderr.contains(&label), "{args:?}: no {label} in {}", ended.stderr);
        assert!(DOCUMENTED.contains(&format!("`{reason}`")), "{reason} isn't documented");
        ended.stderr
    }

    /// Runs it; the command line must be wrong. Returns what it printed.
    fn reject<const N: usize>(&self, args: [&str; N]) -> String {
        let ended = self.run(args);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{args:?}");
        ended.stderr
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// What openssl says of a certificate that is to serve that purpose.
    fn verify(&self, certificate: &str, purpose: &str) -> Said {
        let [ca, crl, certificate] =
            ["ca-cert.pem", "crl.pem", certificate].map(|it| self.text(it));
        run(
            "openssl",
            &[
                "verify",
                "-x509_strict",
                "-crl_check",
                "-purpose",
                purpose,
                "-CAfile",
                &ca,
                "-CRLfile",
                &crl,
                &certificate,
            ],
        )
    }

    /// What `openssl x509` shows of a certificate.
    fn openssl(&self, certificate: &str, args: &[&str]) -> String {
        let certificate = self.text(certificate);
        run("openssl", &[&["x509", "-noout", "-in", &certificate], args].concat()).ok()
    }

    fn serial(&self, certificate: &str) -> String {
        let said = self.openssl(certificate, &["-serial"]);
        said.trim().strip_prefix("serial=").unwrap().to_owned()
    }
}

/// Each file below a folder, with its content.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else {
            files.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Keys are their owner's alone, wherever they are; so are folders.
fn assert_secrecy(folder: &Path) {
    assert_eq!(mode(folder), 0o700, "{}", folder.display());
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(!name.starts_with(".new-"), "{name}");
        if path.is_dir() {
            assert_secrecy(&path);
        } else if name.ends_with("-key.pem") || name == ".lock" {
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        } else {
            assert_eq!(mode(&path), 0o644, "{}", path.display());
        }
    }
}
