//! A CA and a server certificate for one test, and everything that can be wrong with them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};
use tempfile::TempDir;
use time::OffsetDateTime;

const DAY: i64 = 24 * 3600;

/// A folder with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, as libnbd and
/// qemu expect them. It goes when this is dropped.
pub struct Pki {
    folder: TempDir,
    authority: CertificateDer<'static>,
    key: KeyPair,
}

/// What a certificate is made with.
pub struct Recipe {
    /// From how many days ago to in how many days it is valid.
    pub days: (i64, i64),
    /// In how many seconds it expires, instead.
    pub ends_in: Option<i64>,
    /// An RSA key instead of one on a curve.
    pub rsa: bool,
    /// Signed by an intermediate CA, whose certificate follows in the file.
    pub intermediate: bool,
    /// The CA's name.
    pub authority: &'static str,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            days: (-1, 365),
            ends_in: None,
            rsa: false,
            intermediate: false,
            authority: "hexz-nbd test CA",
        }
    }
}

impl Pki {
    pub fn new() -> Self {
        Self::made_by(&Recipe::default())
    }

    pub fn expired() -> Self {
        Self::made_by(&Recipe { days: (-30, -2), ..Recipe::default() })
    }

    pub fn not_yet_valid() -> Self {
        Self::made_by(&Recipe { days: (2, 30), ..Recipe::default() })
    }

    pub fn rsa() -> Self {
        Self::made_by(&Recipe { rsa: true, ..Recipe::default() })
    }

    pub fn with_intermediate() -> Self {
        Self::made_by(&Recipe { intermediate: true, ..Recipe::default() })
    }

    pub fn made_by(recipe: &Recipe) -> Self {
        let folder = tempfile::Builder::new().prefix("hexz-nbd-test-").tempdir().unwrap();
        let root = CertifiedIssuer::self_signed(
            authority(recipe.authority, 1),
            KeyPair::generate().unwrap(),
        )
        .unwrap();

        let key = if recipe.rsa { rsa_key(folder.path()) } else { KeyPair::generate().unwrap() };
        let mut parameters = server(recipe.days);
        if let Some(seconds) = recipe.ends_in {
            parameters.not_after = from_now(seconds);
        }
        let chain = if recipe.intermediate {
            let middle = CertifiedIssuer::signed_by(
                authority("hexz-nbd test intermediate", 0),
                KeyPair::generate().unwrap(),
                &root,
            )
            .unwrap();
            parameters.signed_by(&key, &middle).unwrap().pem() + &middle.pem()
        } else {
            parameters.signed_by(&key, &root).unwrap().pem()
        };

        let pki = Self { folder, authority: root.der().clone(), key };
        fs::write(pki.ca_cert(), root.pem()).unwrap();
        fs::write(pki.server_cert(), chain).unwrap();
        write_secret(&pki.server_key(), &pki.key.serialize_pem());
        pki
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn ca_cert(&self) -> PathBuf {
        self.folder().join("ca-cert.pem")
    }

    pub fn server_cert(&self) -> PathBuf {
        self.folder().join("server-cert.pem")
    }

    pub fn server_key(&self) -> PathBuf {
        self.folder().join("server-key.pem")
    }

    /// Puts a key in place that isn't the certificate's.
    pub fn with_wrong_key(self) -> Self {
        write_secret(&self.server_key(), &KeyPair::generate().unwrap().serialize_pem());
        self
    }

    /// Lets everybody read the key, and come to it.
    pub fn with_exposed_key(self) -> Self {
        fs::set_permissions(self.folder(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(self.server_key(), fs::Permissions::from_mode(0o644)).unwrap();
        self
    }

    /// Rewrites the key as `openssl pkey` does with these arguments: `-traditional` makes
    /// PKCS#1 of an RSA key, SEC1 of another.
    pub fn with_key_rewritten(self, args: &[&str]) -> Self {
        let (from, to) = (self.server_key(), self.folder().join("rewritten.pem"));
        openssl(
            Command::new("openssl")
                .arg("pkey")
                .args(args)
                .arg("-in")
                .arg(from)
                .arg("-out")
                .arg(&to),
        );
        let pem = fs::read_to_string(to).unwrap();
        write_secret(&self.server_key(), &pem);
        self
    }

    /// Puts a key on some other curve in place.
    pub fn with_key_on(self, curve: &str) -> Self {
        let path = self.folder().join("other.pem");
        let curve = format!("ec_paramgen_curve:{curve}");
        openssl(
            Command::new("openssl")
                .args(["genpkey", "-algorithm", "EC", "-pkeyopt", &curve, "-out"])
                .arg(&path),
        );
        let pem = fs::read_to_string(path).unwrap();
        write_secret(&self.server_key(), &pem);
        self
    }

    /// The CA's certificate.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// A client that trusts this CA alone, with TLS 1.2 and 1.3.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.client_config_for(&[&version::TLS13, &version::TLS12])
    }

    pub fn client_config_for(
        &self,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        trusting(&self.authority, versions)
    }
}

/// A client that trusts `authority` alone.
pub fn trusting(
    authority: &CertificateDer<'static>,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    trusting_with(authority, versions, None)
}

/// The same, with a certificate of its own.
pub fn trusting_with(
    authority: &CertificateDer<'static>,
    versions: &[&'static SupportedProtocolVersion],
    own: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match own {
        Some((certificate, key)) => config.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => config.with_no_client_auth(),
    })
}

pub fn authority(name: &str, below: u8) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.use_authority_key_identifier_extension = true;
    parameters
}

fn server((from, to): (i64, i64)) -> CertificateParams {
    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut parameters = CertificateParams::new(names).unwrap();
    parameters.distinguished_name.push(DnType::CommonName, "localhost");
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.use_authority_key_identifier_extension = true;
    parameters.not_before = from_now(from * DAY);
    parameters.not_after = from_now(to * DAY);
    parameters
}

/// The time in so many seconds, or that many ago.
pub fn from_now(seconds: i64) -> OffsetDateTime {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(now.saturating_add_signed(seconds))
}

/// rcgen makes no RSA keys with the features that this program needs of it.
fn rsa_key(folder: &Path) -> KeyPair {
    let path = folder.join("rsa.pem");
    openssl(
        Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(&path),
    );
    KeyPair::from_pem(&fs::read_to_string(path).unwrap()).unwrap()
}

fn openssl(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().expect("the openssl command is missing");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

pub fn write_secret(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}
