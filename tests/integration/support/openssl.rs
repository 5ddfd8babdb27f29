//! Certificates, keys and lists as openssl makes them by default, and of kinds that rcgen has not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::pki::write_secret;

/// A folder in which openssl works. It goes when this is dropped.
pub struct Openssl(TempDir);

/// A way to make a key.
pub const P256: &[&str] = &["EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
pub const SECP256K1: &[&str] = &["EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"];
pub const RSA_1024: &[&str] = &["RSA", "-pkeyopt", "rsa_keygen_bits:1024"];
pub const RSA_PSS: &[&str] = &["RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048"];
pub const ED448: &[&str] = &["ED448"];

impl Openssl {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("hexz-nbd-test-openssl-").tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn run(&self, args: &[&str]) -> String {
        let output = Command::new("openssl")
            .args(args)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .output()
            .expect("the openssl command is missing");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `NAME.key`, made that way.
    pub fn key(&self, name: &str, way: &[&str]) -> PathBuf {
        let file = format!("{name}.key");
        self.run(&[&["genpkey", "-out", &file, "-algorithm"], way].concat());
        let path = self.path(&file);
        write_secret(&path, &self.read(&file));
        path
    }

    /// `NAME.pem`, self-signed with `NAME.key`: a CA's certificate, as `req -x509` makes it, or
    /// that of an end entity.
    pub fn self_signed(&self, name: &str, is_ca: bool) -> PathBuf {
        let (key, out, subject) =
            (format!("{name}.key"), format!("{name}.pem"), format!("/CN={name}"));
        let constraint =
            format!("basicConstraints=critical,CA:{}", if is_ca { "TRUE" } else { "FALSE" });
        self.run(&[
            "req",
            "-x509",
            "-key",
            &key,
            "-subj",
            &subject,
            "-days",
            "60",
            "-out",
            &out,
            "-config",
            "/dev/null",
            "-addext",
            &constraint,
        ]);
        self.path(&out)
    }

    /// `NAME.pem`, signed by `CA.key`, with those extensions; without any it is of version 1.
    pub fn signed(&self, name: &str, ca: &str, extensions: &str) -> PathBuf {
        let (key, csr, out) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
        let (ca_cert, ca_key) = (format!("{ca}.pem"), format!("{ca}.key"));
        let subject = format!("/CN={name}");
        self.run(&["req", "-new", "-key", &key, "-subj", &subject, "-out", &csr]);
        fs::write(self.path("extensions"), extensions).unwrap();
        let mut args = vec!["x509", "-req", "-in", &csr, "-CA", &ca_cert, "-CAkey", &ca_key];
        args.extend(["-CAcreateserial", "-days", "60", "-out", &out]);
        if !extensions.is_empty() {
            args.extend(["-extfile", "extensions"]);
        }
        self.run(&args);
        let is_v1 = self.run(&["x509", "-in", &out, "-noout", "-text"]).contains("Version: 1 ");
        assert_eq!(is_v1, extensions.is_empty());
        self.path(&out)
    }

    /// `NAME.crl`, an empty list as `openssl ca` makes it without a configuration of extensions:
    /// of version 1.
    pub fn list(&self, name: &str) -> PathBuf {
        let config = "[ca]\ndefault_ca=c\n[c]\ndatabase=index\ndefault_md=sha256\n";
        fs::write(self.path("config"), config).unwrap();
        fs::write(self.path("index"), "").unwrap();
        let (certificate, key, out) =
            (format!("{name}.pem"), format!("{name}.key"), format!("{name}.crl"));
        self.run(&[
            "ca",
            "-config",
            "config",
            "-gencrl",
            "-crldays",
            "60",
            "-keyfile",
            &key,
            "-cert",
            &certificate,
            "-out",
            &out,
        ]);
        assert!(self.run(&["crl", "-in", &out, "-noout", "-text"]).contains("Version 1 "));
        self.path(&out)
    }
}

/// Puts a byte order mark before a file's text.
pub fn mark(path: &Path) {
    let text = fs::read(path).unwrap();
    fs::write(path, [b"\xEF\xBB\xBF", text.as_slice()].concat()).unwrap();
}
