//! CAs that were renewed under their names, with another key and a revocation list for each.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};

use super::{BASE, reads, reload, replace, wait_for_failed_reloads};
use crate::doctor::examine;
use crate::support::authority::{Authority, Certified};
use crate::support::pki::{Pki, authority, from_now};
use crate::support::server::{Builder, Server};

const DAY: i64 = 24 * 3600;
const NAME: &str = "hexz-nbd test client CA, renewed";

/// Both CAs in one file, and the lists in one or in two.
fn asking(folder: &Path, authorities: [&Authority; 2], lists: &[PathBuf]) -> Builder {
    let both = folder.join("ca.pem");
    let pem = authorities.map(|it| fs::read_to_string(it.certificate()).unwrap());
    fs::write(&both, pem.concat()).unwrap();
    let mut builder =
        Server::builder().archive(BASE).tls(Pki::new()).arg("--tls-client-ca").arg(both);
    for list in lists {
        builder = builder.arg("--tls-client-crl").arg(list);
    }
    builder
}

fn comes_in(server: &Server, who: &Certified) -> bool {
    reads(server, who.config(server.pki()))
}

fn with_alert(server: &Server, who: &Certified) -> String {
    let folder = who.folder(server.pki());
    let folder = folder.path().display().to_string();
    let target = format!("localhost:{}", server.port());
    let found = examine(["--no-speed", "--tls-dir", &folder, &target]);
    found.detail("client certificate", "alert").as_str().unwrap_or("accepted").to_owned()
}

/// All clients of one of the CAs were refused: the newest list of that name was asked, whoever
/// had signed it.
#[test]
fn each_key_has_a_list_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::named(NAME), Authority::named(NAME));
    let revoked = [old.alice(), new.alice()];
    old.revoke(&[&revoked[0]]);
    new.revoke(&[&revoked[1]]);
    let both = folder.path().join("crl.pem");
    let lists = [old.revocation_list(), new.revocation_list()];
    let pem = lists.each_ref().map(|list| fs::read_to_string(list).unwrap());
    fs::write(&both, pem.concat()).unwrap();
    let [one, other] = lists;
    for lists in [vec![one.clone(), other.clone()], vec![other, one], vec![both]] {
        for authorities in [[&old, &new], [&new, &old]] {
            let server = asking(folder.path(), authorities, &lists).start();
            for (authority, revoked) in [(&old, &revoked[0]), (&new, &revoked[1])] {
                assert!(comes_in(&server, &authority.alice()), "{lists:?}");
                assert!(!comes_in(&server, revoked), "{lists:?}");
            }
            assert_eq!(with_alert(&server, &old.alice()), "accepted");
            assert_eq!(with_alert(&server, &revoked[0]), "CertificateRevoked");
        }
    }
}

/// A CA without a list lets nobody in, as long as there are any; the others do.
#[test]
fn a_key_without_a_list_lets_nobody_in() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::named(NAME), Authority::named(NAME));
    let server = asking(folder.path(), [&old, &new], &[old.revocation_list()]).start();
    assert!(comes_in(&server, &old.alice()));
    assert!(!comes_in(&server, &new.alice()));
    server.wait_for_cause("unknown_revocation");
    assert_eq!(with_alert(&server, &new.alice()), "UnknownCA");
}

#[test]
fn a_list_of_no_key_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [old, new, stranger] = [(); 3].map(|()| Authority::named(NAME));
    let lists = [old.revocation_list(), new.revocation_list()];
    let start = || asking(folder.path(), [&old, &new], &lists);
    let good = fs::read_to_string(old.revocation_list()).unwrap();
    let foreign = fs::read_to_string(stranger.revocation_list()).unwrap();
    let server = start().start();
    replace(&old.revocation_list(), &foreign);
    server.signal("HUP");
    wait_for_failed_reloads(&server, 1);
    assert!(comes_in(&server, &old.alice()) && comes_in(&server, &new.alice()));
    let (code, error) = start().fail();
    assert_eq!(code, 4, "{error}");
    assert!(error.contains(&old.revocation_list().display().to_string()), "{error}");
    replace(&old.revocation_list(), &good);
    reload(&server, 1);
    assert!(comes_in(&server, &old.alice()));
}

/// A CA between the root and clients, and its list.
struct Middle<'a> {
    issuer: CertifiedIssuer<'a, KeyPair>,
    root: &'a CertifiedIssuer<'static, KeyPair>,
}

impl Middle<'_> {
    fn list(&self, revoked: &[u64]) -> String {
        list(&self.issuer, revoked)
    }

    /// A client with that serial number, which sends its CA's certificate as well.
    fn client(&self, server: &Server, serial: u64) -> Arc<ClientConfig> {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "alice");
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        parameters.use_authority_key_identifier_extension = true;
        parameters.serial_number = Some(SerialNumber::from(serial));
        parameters.not_before = from_now(-DAY);
        parameters.not_after = from_now(DAY);
        let own = parameters.signed_by(&key, &self.issuer).unwrap();
        let chain = [own.der(), self.issuer.der(), self.root.der()].map(Clone::clone).to_vec();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(server.pki().authority().clone()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        Arc::new(config.with_client_auth_cert(chain, key).unwrap())
    }
}

fn list(issuer: &CertifiedIssuer<'_, KeyPair>, revoked: &[u64]) -> String {
    let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: from_now(-60),
        reason_code: None,
        invalidity_date: None,
    });
    let parameters = CertificateRevocationListParams {
        this_update: from_now(-DAY),
        next_update: from_now(DAY),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    parameters.signed_by(issuer).unwrap().pem().unwrap()
}

/// The server doesn't have their certificates, so that their lists are told apart by the key
/// identifier.
#[test]
fn the_same_for_a_ca_between_root_and_client() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let key = || KeyPair::generate().unwrap();
    let root = CertifiedIssuer::self_signed(authority("hexz-nbd test root", 1), key()).unwrap();
    let [old, new] = [(); 2].map(|()| {
        let issuer = CertifiedIssuer::signed_by(authority(NAME, 0), key(), &root).unwrap();
        Middle { issuer, root: &root }
    });
    fs::write(path("ca.pem"), root.pem()).unwrap();
    let start = |lists: &[String]| {
        fs::write(path("crl.pem"), lists.concat()).unwrap();
        let builder = Server::builder().archive(BASE).tls(Pki::new());
        let builder = builder.arg("--tls-client-ca").arg(path("ca.pem"));
        builder.arg("--tls-client-crl").arg(path("crl.pem")).start()
    };
    let of_root = list(&root, &[]);
    for lists in [
        [of_root.clone(), old.list(&[7]), new.list(&[8])],
        [new.list(&[8]), old.list(&[7]), of_root.clone()],
    ] {
        let server = start(&lists);
        let can_read = |middle: &Middle<'_>, serial| reads(&server, middle.client(&server, serial));
        assert!(can_read(&old, 8) && can_read(&new, 7));
        assert!(!can_read(&old, 7) && !can_read(&new, 8));
    }
    // One of them has no list.
    let server = start(&[of_root, old.list(&[])]);
    assert!(reads(&server, old.client(&server, 1)));
    assert!(!reads(&server, new.client(&server, 1)));
}
