//! More than a year of a server and two clients, whose certificates are renewed, revoked and
//! replaced while they are in use. libfaketime moves the clocks of the built binary: a file has the
//! time, which is the same for the server and all commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;

use crate::admission::{come_in, reads, replace};
use crate::clients::{Said, run, run_command};
use crate::monitor::{metrics, status};
use crate::support::client::{Client, Session};
use crate::support::server::{Line, Server};
use crate::support::wait_until;

/// 2030-01-01, when it all begins.
const START: u64 = 1_893_456_000;
const DAY: u64 = 24 * 3600;
const NAMES: [&str; 2] = ["alpha.example.org", "beta.example.org"];

/// The machines of a season: that of the CA, the server, and a client for each name.
struct Season {
    folder: tempfile::TempDir,
    faketime: PathBuf,
    day: u64,
}

/// A time that doesn't pass.
#[derive(Debug)]
struct Fixed(u64);

impl TimeProvider for Fixed {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0)))
    }
}

impl Season {
    fn new() -> Self {
        let libraries = fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path());
        let faketime = libraries.map(|it| it.join("faketime/libfaketime.so.1"));
        let faketime = faketime.into_iter().find(|path| path.exists());
        let season = Self {
            folder: tempfile::tempdir().unwrap(),
            faketime: faketime.expect("libfaketime is needed; try `make tools`"),
            day: 0,
        };
        season.set_clock();
        season
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn now(&self) -> u64 {
        START + self.day * DAY
    }

    fn set_clock(&self) {
        let time = humantime::format_rfc3339_seconds(
            std::time::UNIX_EPOCH + Duration::from_secs(self.now()),
        );
        let time = time.to_string().replace('T', " ").replace('Z', "");
        replace(&self.path("clock"), &format!("@{time}\n"));
    }

    /// Lets the time pass until that day.
    fn until(&mut self, day: u64) {
        assert!(day > self.day);
        self.day = day;
        self.set_clock();
    }

    /// The environment in which the binary has the time of the file. Its timeouts, and the times of
    /// files, are real.
    fn environment(&self) -> [(&'static str, PathBuf); 6] {
        [
            ("LD_PRELOAD", self.faketime.clone()),
            ("FAKETIME_TIMESTAMP_FILE", self.path("clock")),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
            ("TZ", "UTC".into()),
        ]
    }

    fn pki(&self, args: &[&str]) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
        command.arg("pki").arg("--dir").arg(self.path("pki")).args(args);
        command.envs(self.environment());
        run_command(command)
    }

    /// The names in the certificates that expire within so many days.
    fn expiring(&self, days: u64) -> Vec<String> {
        let within = format!("{days}d");
        let said = self.pki(&["show", "--json", "--expiring", &within]);
        let is_empty = said.output().is_some();
        let list: Value = serde_json::from_str(said.everything().trim()).unwrap();
        let list = list.as_array().unwrap();
        assert_eq!(is_empty, list.is_empty(), "{list:?}");
        list.iter().map(|it| it["names"][0]["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Copies a client's files to the client.
    fn deploy_client(&self, name: &str) {
        copy_all(&self.path("pki/clients").join(name), &self.path(name));
    }

    /// Puts a copy of a file of the CA in the place of the server's, in one step.
    fn deploy(&self, from: &str, to: &str) {
        let to = self.path("tls").join(to);
        let new = to.with_extension("new");
        fs::copy(self.path("pki").join(from), &new).unwrap();
        fs::rename(new, to).unwrap();
    }

    /// A client with the files in that folder.
    fn config(&self, folder: &str) -> Arc<ClientConfig> {
        let pem = |name: &str| fs::read(self.path(folder).join(name)).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&pem("ca-cert.pem")).unwrap()).unwrap();
        let own = CertificateDer::from_pem_slice(&pem("client-cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&pem("client-key.pem")).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_details(provider, Arc::new(Fixed(self.now())))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        Arc::new(config.with_client_auth_cert(vec![own], key).unwrap())
    }

    fn reads(&self, server: &Server, folder: &str) -> bool {
        reads(server, self.config(folder))
    }

    /// A client that reads, and stays connected.
    fn session(&self, server: &Server, folder: &str) -> Client<Session> {
        let mut client = come_in(server, self.config(folder));
        client.go("");
        client.read_ok(0, 512);
        client
    }

    fn sha256_of_server(&self) -> String {
        let certificate = self.path("pki/servers/localhost/server-cert.pem");
        let said = run(
            "openssl",
            &["x509", "-noout", "-fingerprint", "-sha256", "-in", certificate.to_str().unwrap()],
        );
        let said = said.ok();
        said.trim().split_once('=').unwrap().1.replace(':', "").to_lowercase()
    }
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn lines(server: &Server, wanted: impl Fn(&Line) -> bool) -> Vec<Line> {
    server.log().into_iter().filter(|line| wanted(line)).collect()
}

fn warnings(server: &Server, reason: &str) -> usize {
    lines(server, |line| line.reason() == reason).len()
}

/// Waits until so many reloads have taken effect, and returns what the last one has changed.
fn reloaded(server: &Server, times: usize) -> String {
    server.wait_for_reloads(times);
    let reloads = lines(server, |line| line.json["dropped"].is_u64());
    assert_eq!(reloads.len(), times, "{}", server.log_text());
    reloads[times - 1].json["changed"].as_str().unwrap().to_owned()
}

/// Waits until a connection is dropped for that reason, `times` times since the start.
fn dropped(server: &Server, cause: &str, times: usize) {
    let is_dropped = |line: &Line| line.reason() == "dismissed" && line.json["cause"] == cause;
    wait_until("it is dropped", || lines(server, is_dropped).len() >= times);
}

/// Waits until a client is refused for that reason.
fn refused(server: &Server, cause: &str) {
    let is_refused = |line: &Line| line.reason() == "tls_handshake" && line.json["cause"] == cause;
    server.wait_for_log(cause, is_refused);
}

fn clients_that(server: &Server, state: &str) -> f64 {
    metrics(server)[&format!("hexz_nbd_client_certificates{{state=\"{state}\"}}")]
}

#[test]
fn certificates_are_renewed_and_revoked_for_more_than_a_year() {
    let mut season = Season::new();
    let [alpha, beta] = NAMES;
    season.pki(&["init"]).ok();
    season.pki(&["server", "localhost", "127.0.0.1"]).ok();
    for name in NAMES {
        season.pki(&["client", name]).ok();
        season.deploy_client(name);
    }
    copy_all(&season.path("pki/servers/localhost"), &season.path("tls"));
    season.deploy("crl.pem", "crl.pem");
    let tls = season.path("tls");
    let file = |name: &str| tls.join(name);
    let mut builder = Server::builder().archive("base-zstd.hxz");
    for (name, value) in season.environment() {
        builder = builder.env(name, value);
    }
    for (option, name) in [
        ("--tls-cert", "server-cert.pem"),
        ("--tls-key", "server-key.pem"),
        ("--tls-client-ca", "ca-cert.pem"),
        ("--tls-client-crl", "crl.pem"),
    ] {
        builder = builder.arg(option).arg(file(name));
    }
    // In the sandbox, libfaketime couldn't read the time.
    let builder = builder.args(["--watch", "--sandbox", "off", "--monitor", "127.0.0.1:0"]);
    let server = builder.start();

    // The first quarter: both clients are new, and one of them stays connected.
    assert_eq!(season.expiring(30), [""; 0]);
    let mut first = season.session(&server, alpha);
    assert!(season.reads(&server, beta));
    assert_eq!(
        (clients_that(&server, "valid"), warnings(&server, "client_certificate_expires")),
        (2.0, 0)
    );

    // Day 80: alpha connects and is warned about, once a day; beta hasn't been seen for long.
    season.until(80);
    assert_eq!(season.expiring(30), NAMES);
    assert_eq!(season.expiring(9), [""; 0]);
    for _ in 0..2 {
        assert!(season.reads(&server, alpha));
    }
    let warned = server.wait_for_reason("client_certificate_expires");
    assert_eq!(warned.json["identity"], format!("dns:{alpha}"));
    assert_eq!((clients_that(&server, "valid"), clients_that(&server, "expires_soon")), (0.0, 1.0));
    let shown = status(&server);
    let shown = &shown["client_certificates"]["expiring"][0];
    assert_eq!(shown["identity"], format!("dns:{alpha}"));
    assert_eq!(shown["expires"], (START + 90 * DAY) as f64);

    // It is renewed; the former certificate is good until it is revoked.
    copy_all(&season.path(alpha), &season.path("alpha-old"));
    season.pki(&["renew", alpha]).ok();
    season.deploy_client(alpha);
    assert!(season.reads(&server, alpha) && season.reads(&server, "alpha-old"));
    first.read_ok(0, 512);
    let said = season.pki(&["revoke", "--reason", "superseded", alpha]).ok();
    assert!(said.contains("\nkept, as the newest: client alpha.example.org"), "{said}");
    season.deploy("crl.pem", "crl.pem");
    assert_eq!(reloaded(&server, 1), "revocation_lists");
    dropped(&server, "revoked", 1);
    first.expect_closed();
    assert!(season.reads(&server, alpha) && !season.reads(&server, "alpha-old"));
    refused(&server, "revoked");
    assert_eq!((clients_that(&server, "valid"), clients_that(&server, "expires_soon")), (1.0, 0.0));
    // Nobody has renewed beta's: it can't be revoked as superseded.
    season.pki(&["revoke", "--reason", "superseded", beta]).failed();
    assert!(season.reads(&server, beta));

    // Day 91: beta is dropped, and refused until its certificate is renewed.
    let mut second = season.session(&server, beta);
    season.until(91);
    dropped(&server, "expired", 1);
    second.expect_closed();
    assert!(!season.reads(&server, beta) && season.reads(&server, alpha));
    refused(&server, "expired");
    assert_eq!(clients_that(&server, "expired"), 0.0, "seen last 11 days ago");
    season.pki(&["renew", beta]).ok();
    season.deploy_client(beta);
    assert!(season.reads(&server, beta));

    // A timer renews the clients from then on.
    for day in [160, 225, 290, 355] {
        season.until(day);
        assert_eq!(season.expiring(30).len(), 2, "day {day}");
        season.pki(&["renew", "--expiring", "30d"]).ok();
        assert_eq!(season.expiring(30), [""; 0]);
        for name in NAMES {
            season.deploy_client(name);
            assert!(season.reads(&server, name), "{name} on day {day}");
        }
    }
    season.pki(&["revoke", "--reason", "superseded", alpha]).ok();
    season.pki(&["revoke", "--reason", "superseded", beta]).ok();
    season.deploy("crl.pem", "crl.pem");
    assert_eq!(reloaded(&server, 2), "revocation_lists");
    assert!(NAMES.iter().all(|name| season.reads(&server, name)));

    // Day 371: the server's expires soon. What is wrong with the first attempts isn't used.
    season.until(371);
    server.wait_for_reason("certificate_expires");
    let mut third = season.session(&server, alpha);
    let before = fs::read_to_string(file("server-cert.pem")).unwrap();
    season.pki(&["renew", "--expiring", "30d"]).ok();
    let failures = |cause: &str, times| {
        let is_failure =
            |line: &Line| line.reason() == "reload_failed" && line.json["cause"] == cause;
        wait_until(cause, || lines(&server, is_failure).len() >= times);
        assert!(NAMES.iter().all(|name| season.reads(&server, name)), "{cause}");
    };
    replace(&file("server-cert.pem"), &before[..before.len() / 2]);
    failures("tls_file_unreadable", 1);
    replace(&file("server-cert.pem"), &before);
    assert_eq!(reloaded(&server, 3), "nothing");
    season.deploy("servers/localhost/server-key.pem", "server-key.pem");
    failures("key_mismatch", 1);
    season.deploy("servers/localhost/server-cert.pem", "server-cert.pem");
    assert_eq!(reloaded(&server, 4), "certificate");
    let is_certificate = |line: &Line| line.message().starts_with("reload: certificate expires ");
    let changed = server.wait_for_log("it has another certificate", is_certificate);
    assert!(changed.message().contains(&season.sha256_of_server()), "{}", changed.text);
    assert!(changed.message().contains("expires 2032-02-0"), "{}", changed.text);

    // Day 400: the first one has expired, and nobody notices.
    season.until(400);
    assert!(NAMES.iter().all(|name| season.reads(&server, name)));
    third.read_ok(0, 512);
    third.disconnect();
    assert!(!server.has_reason("certificate_expired"));
    // Each client was warned about once, on day 80.
    assert_eq!(warnings(&server, "client_certificate_expires"), 2);
    let numbers = metrics(&server);
    let expiry = numbers["hexz_nbd_tls_expiry_timestamp_seconds{what=\"certificate\"}"];
    assert!(expiry > (START + (371 + 396) * DAY) as f64, "{expiry}");
    assert_eq!(numbers["hexz_nbd_reloads_total{result=\"succeeded\"}"], 4.0);
    assert!(numbers["hexz_nbd_reloads_total{result=\"failed\"}"] >= 2.0);
    assert_eq!(numbers["hexz_nbd_last_reload_successful"], 1.0);
    let earliest = numbers["hexz_nbd_tls_expiry_timestamp_seconds{what=\"client_certificate\"}"];
    assert!(earliest > (START + 444 * DAY) as f64, "{earliest}");
}
