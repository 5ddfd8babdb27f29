//! Against other people's servers. One that is missing is a failure: `make tools` installs them.

use std::ffi::OsString;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::authority::Authority;
use crate::support::pki::Pki;
use crate::support::server::run;
use crate::support::wait_until;

use super::{Found, examine};

/// A server of somebody else's, until this is dropped.
pub(super) struct Other {
    child: Child,
    pub(super) port: u16,
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody has: below those that the system gives out by itself.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + std::process::id() as u16 % 8_000;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn command(program: &str, args: &[&str]) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command
        .args(args)
        .env("PATH", format!("/usr/sbin:/usr/bin:/sbin:/bin:{path}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn start(program: &str, port: u16, args: &[&str]) -> Other {
    let child = command(program, args)
        .spawn()
        .unwrap_or_else(|error| panic!("{program} is needed: {error}; try `make tools`"));
    let mut other = Other { child, port };
    wait_until(&format!("{program} listens"), || {
        assert!(other.child.try_wait().unwrap().is_none(), "{program} ended");
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    other
}

fn nbdkit(args: &[&str]) -> Other {
    let port = free_port();
    let listen = ["-f", "-i", "127.0.0.1", "-p", &port.to_string()].map(str::to_owned);
    let mut all: Vec<&str> = listen.iter().map(String::as_str).collect();
    all.extend(args);
    start("nbdkit", port, &all)
}

/// Lets a server find everything in one folder.
fn nbdkit_with_tls(pki: &Pki, more: &[&str]) -> Other {
    nbdkit_with_folder(pki.folder(), more)
}

pub(super) fn nbdkit_with_folder(folder: &Path, more: &[&str]) -> Other {
    let folder = format!("--tls-certificates={}", folder.display());
    let args = [&["--tls=require", &folder], more].concat();
    nbdkit(&args)
}

fn with_ca(pki: &Pki, other: &Other) -> Vec<OsString> {
    let target = format!("localhost:{}", other.port);
    vec!["--no-speed".into(), "--tls-ca".into(), pki.ca_cert().into(), target.into()]
}

fn with_folder(folder: &Path, other: &Other) -> Vec<OsString> {
    let target = format!("localhost:{}", other.port);
    vec!["--no-speed".into(), "--tls-dir".into(), folder.into(), target.into()]
}

fn assert_tls_works(found: &Found) {
    found.assert_works();
    assert_eq!(found.detail("certificate", "verified"), true, "{:#}", found.report);
    found.assert_outcome("TLS", "good").assert_outcome("certificate", "good");
}

#[test]
fn nbdkit_in_clear() {
    let other = nbdkit(&["memory", "3000001"]);
    let found = examine([format!("localhost:{}", other.port)]);
    found.assert_works().assert_outcome("export", "warning");
    assert_eq!(found.detail("export", "size"), 3_000_001);
    assert_eq!(found.detail("replies", "structured"), true);
    assert_eq!(found.detail("export", "read_only"), false);
    found.assert_advice("export", "size_not_multiple_of_512", "server");
    let advice = found.step("export")["advice"][0]["text"].as_str().unwrap();
    assert!(advice.contains("193 bytes"), "{advice}");
    let found = examine(["--require-tls".to_owned(), format!("localhost:{}", other.port)]);
    found.assert_ends("in clear", "tls_not_offered", "server");
}

#[test]
fn nbdkit_oldstyle() {
    let other = nbdkit(&["-o", "memory", "1M"]);
    let found = examine([format!("localhost:{}", other.port)]);
    found.assert_ends("greeting", "oldstyle", "server");
}

#[test]
fn nbdkit_over_tls() {
    let pki = Pki::new();
    let other = nbdkit_with_tls(&pki, &["memory", "1M"]);
    assert_tls_works(&examine(with_ca(&pki, &other)));
    let found = examine(with_ca(&Pki::new(), &other));
    found.assert_ends("certificate", "ca_key_differs", "client");

    // Offered and not required: the list is the same inside and outside.
    let folder = format!("--tls-certificates={}", pki.folder().display());
    let other = nbdkit(&["--tls=on", &folder, "memory", "1M"]);
    let found = examine(with_ca(&pki, &other));
    assert_tls_works(&found);
    assert_eq!(found.detail("in clear", "tls"), "offered");
    assert_eq!(found.detail("exports", "count"), 1);
    assert_eq!(found.report["outcome"], "good", "{:#}", found.report);
}

/// These serve one client at a time, and expect a ClientHello before they send anything.
#[test]
fn https_servers_are_recognized() {
    const PYTHON: &str = "
import http.server, ssl, sys
server = http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.BaseHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
";
    let pki = Pki::new();
    let [cert, key] =
        [pki.server_cert(), pki.server_key()].map(|path| path.to_str().unwrap().to_owned());
    let port = free_port();
    let openssl = start(
        "openssl",
        port,
        &[
            "s_server",
            "-www",
            "-accept",
            &format!("127.0.0.1:{port}"),
            "-cert",
            &cert,
            "-key",
            &key,
        ],
    );
    let port = free_port();
    let python = start("python3", port, &["-c", PYTHON, &port.to_string(), &cert, &key]);
    for other in [openssl, python] {
        let target = format!("127.0.0.1:{}", other.port);
        let found = examine(["--timeout", "2s", &target]);
        found.assert_ends("greeting", "other_protocol", "client");
        found.assert_advice("greeting", "other_protocol", "server");
        assert_eq!(found.detail("greeting", "protocol"), "tls");
    }
}

#[test]
fn certificates_out_of_their_time() {
    for (pki, reason) in [(Pki::expired(), "expired"), (Pki::not_yet_valid(), "not_yet_valid")] {
        let other = nbdkit_with_tls(&pki, &["memory", "1M"]);
        let found = examine(with_ca(&pki, &other));
        found.assert_ends("certificate", "outside_validity", "server");
        found.assert_ends("certificate", reason, "client");
        assert_eq!(found.detail("certificate", reason), true);
        // The same without a CA: clients that verify won't come in.
        let found = examine([format!("localhost:{}", other.port)]);
        found.assert_bad("certificate", "not_verified", "client");
        found.assert_bad("certificate", reason, "client");
    }
}

#[test]
fn nbdkit_wants_client_certificates() {
    let (pki, authority) = (Pki::new(), Authority::new());
    // nbdkit has one file for both.
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, from: &Path| {
        fs::copy(from, folder.path().join(name)).unwrap();
    };
    put("server-cert.pem", &pki.server_cert());
    put("server-key.pem", &pki.server_key());
    put("ca-cert.pem", &authority.certificate());
    let certificates = format!("--tls-certificates={}", folder.path().display());
    let other = nbdkit(&["--tls=require", &certificates, "--tls-verify-peer", "memory", "1M"]);
    let alice = authority.alice().folder(&pki);
    let found = examine(with_folder(alice.path(), &other));
    assert_tls_works(&found);
    assert_eq!(found.detail("client certificate", "accepted"), true);

    let found = examine(with_ca(&pki, &other));
    found.assert_ends("client certificate", "client_certificate_required", "client");
    let stranger = Authority::named("other").alice().folder(&pki);
    let found = examine(with_folder(stranger.path(), &other));
    let reasons = found.step("client certificate")["reasons"].to_string();
    assert!(reasons.contains("client_certificate_"), "{:#}", found.report);
    found.assert_outcome("client certificate", "bad");
}

#[test]
fn nbdkit_with_pre_shared_keys() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    fs::write(&keys, "alice:0123456789abcdef0123456789abcdef\n").unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    let psk = format!("--tls-psk={}", keys.display());
    let other = nbdkit(&["--tls=require", &psk, "memory", "1M"]);
    let found = examine([format!("localhost:{}", other.port)]);
    found.assert_ends("TLS", "closed_after_starttls", "server");
}

#[test]
fn nbdkit_whose_disk_has_a_fault() {
    let other =
        nbdkit(&["--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%"]);
    let found = examine([format!("localhost:{}", other.port)]);
    found.assert_bad("first read", "read_error", "server");
    found.assert_outcome("goodbye", "good");
}

fn image() -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn qemu_nbd() {
    let (_folder, image) = image();
    let port = free_port().to_string();
    let listen = ["-t", "-f", "raw", "-b", "127.0.0.1", "-p", &port, "-x", "disk"];
    let other = start("qemu-nbd", port.parse().unwrap(), &[&listen[..], &[&image]].concat());
    let found = examine([format!("localhost:{}", other.port)]);
    found.assert_works().assert_outcome("default export", "warning");
    assert_eq!(found.detail("export", "size"), 1 << 20);
    drop(other);

    // It insists on a key usage that certificates by "hexz-nbd pki" have.
    let folder = tempfile::tempdir().unwrap();
    let pki = folder.path().join("pki");
    let dir = pki.to_str().unwrap();
    for command in [&["init"][..], &["server", "localhost"], &["client", "backup.example.org"]] {
        assert_eq!(run([&["pki", "--dir", dir], command].concat()).code, Some(0), "{command:?}");
    }
    let (server, client) = (pki.join("servers/localhost"), pki.join("clients/backup.example.org"));
    let tls = |verify: &str| {
        let object = format!(
            "tls-creds-x509,id=t,endpoint=server,dir={},verify-peer={verify}",
            server.display()
        );
        let port = free_port().to_string();
        let listen = ["-t", "-f", "raw", "-b", "127.0.0.1", "-p", &port, "-x", "disk"];
        let tls = ["--object", &object, "--tls-creds", "t", &image];
        start("qemu-nbd", port.parse().unwrap(), &[&listen[..], &tls].concat())
    };
    let ca = |other: &Other| -> Vec<OsString> {
        let target = format!("localhost:{}", other.port);
        vec!["--tls-ca".into(), pki.join("ca-cert.pem").into(), target.into()]
    };
    let other = tls("yes");
    assert_tls_works(&examine(with_folder(&client, &other)));
    let found = examine(ca(&other));
    found.assert_ends("client certificate", "client_certificate_required", "client");
    drop(other);
    let found = examine(ca(&tls("no")));
    assert_tls_works(&found);
    // Whether it asks or not, it does without.
    found.assert_outcome("client certificate", "good");
}

/// nbd-server, which goes into the background, and is told everything by a file.
struct NbdServer {
    port: u16,
    folder: TempDir,
}

impl NbdServer {
    fn start(tls: Option<&Pki>) -> Self {
        let (folder, image) = image();
        let port = free_port();
        let of_tls = tls.map_or(String::new(), |pki| {
            format!(
                "certfile = {}\nkeyfile = {}\ncacertfile = {}\nforce_tls = true\n",
                pki.server_cert().display(),
                pki.server_key().display(),
                pki.ca_cert().display()
            )
        });
        let config = format!(
            "[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nallowlist = true\n{of_tls}\
             [one]\nexportname = {image}\nreadonly = true\n"
        );
        let server = Self { port, folder };
        let [config_file, pid_file] = ["config", "pid"].map(|name| server.path(name));
        fs::write(&config_file, config).unwrap();
        let args = ["-C", &config_file, "-p", &pid_file];
        let started = command("nbd-server", &args).status();
        let started = started
            .unwrap_or_else(|error| panic!("nbd-server is needed: {error}; try `make tools`"));
        assert!(started.success());
        wait_until("nbd-server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.path("pid")).unwrap_or_default();
        if let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

#[test]
fn nbd_server_in_clear_and_over_tls() {
    let other = NbdServer::start(None);
    let found = examine([format!("localhost:{}", other.port)]);
    found.assert_works().assert_outcome("default export", "warning");
    assert_eq!(found.detail("replies", "structured"), false);
    assert_eq!(found.detail("exports", "names")[0]["name"], "one");
    drop(other);

    let pki = Pki::new();
    let other = NbdServer::start(Some(&pki));
    // It asks for a certificate of the CA that it was given.
    let target = format!("localhost:{}", other.port);
    let found = examine(["--tls-ca".into(), pki.ca_cert().into_os_string(), target.into()]);
    found.assert_ends("client certificate", "client_certificate_required", "client");
    assert_eq!(found.detail("certificate", "verified"), true);
}
