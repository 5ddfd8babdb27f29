//! The real clients with what they get: the commands that are printed, a server that asks for
//! certificates, and qemu's own server.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ProtocolVersion, RootCertStore, ServerConfig, ServerConnection};

use super::Ca;
use crate::clients::{Said, run, run_command};
use crate::support::client::{Client, Plain};
use crate::support::server::Server;
use crate::support::{archive, image};

const SERVER: &str = "servers/localhost";

/// The kinds of key. There is no option for the first; this one changes nothing.
const P256: &str = "--log-format=text";
const ED25519: &str = "--ed25519";

/// The commands in what was printed: those of each paragraph.
fn commands(said: &str) -> Vec<Vec<String>> {
    let joined = said.replace("\\\n", " ");
    let lines: Vec<_> = joined.lines().collect();
    let paragraphs = lines.split(|line| !line.starts_with("    "));
    let commands = paragraphs.filter(|lines| !lines.is_empty());
    commands.map(|lines| lines.iter().map(|line| line.trim().to_owned()).collect()).collect()
}

/// The words that a shell makes of a command.
fn words(command: &str) -> Vec<String> {
    let said = run("sh", &["-c", &format!("printf '%s\\n' {command}")]).ok();
    said.lines().map(str::to_owned).collect()
}

/// Each command that is printed, in a folder with a name that needs all the quoting there is.
#[test]
fn printed_commands_work() {
    let ca = Ca::nowhere_called("it's, a \"100%\" & $odd ü?");
    ca.make(["init"]);
    let said = ca.make(["server", "localhost", "127.0.0.1"]);
    let [command] = &commands(&said)[0][..] else { panic!("{said}") };
    let here = tempfile::tempdir().unwrap();
    let snapshot = here.path().join("snap.hexz");
    fs::copy(archive("base-zstd.hxz"), &snapshot).unwrap();
    let mut args = words(command);
    assert_eq!(args.remove(0), "hexz-nbd");
    assert_eq!(args.pop().unwrap(), "snap.hexz");
    // Nobody else is here.
    let allow = args.iter().position(|arg| arg == "--allow").unwrap();
    args[allow + 1] = "127.0.0.1,::1".to_owned();
    let server = Server::builder().args(args).arg(&snapshot).start();

    let said = ca.make(["client", "spiffe://corp/backup/1"]);
    let port = server.port();
    let here = here.path();
    let sh = |command: &str| {
        let command = command
            .replace("localhost/snap", &format!("localhost:{port}/snap"))
            .replace("port=10809", &format!("port={port}"))
            .replace("localhost 10809 /dev/nbd0 -N snap.hexz", &format!("-l localhost {port}"));
        let mut shell = Command::new("sh");
        shell.args(["-c", &command]).current_dir(here).env("HOME", here);
        shell.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        run_command(shell).ok()
    };
    let [info, copy, convert, nbd_client] = &commands(&said)[0][..] else { panic!("{said}") };
    assert!(sh(info).contains("export-size: 8388608"));
    sh(copy);
    assert!(fs::read(here.join("disk.img")).unwrap() == image());
    sh(convert);
    sh("qemu-img convert -O raw disk.qcow2 disk.raw");
    assert!(fs::read(here.join("disk.raw")).unwrap() == image());
    assert!(sh(nbd_client).contains("snap.hexz"));

    // nbdfuse itself needs a right that tests may not have; what counts is where libnbd looks.
    let [install, mount] = &commands(&said)[1][..] else { panic!("{said}") };
    sh(install);
    let uri = mount.strip_prefix("nbdfuse mnt ").unwrap();
    // Root would look in /etc.
    let info = format!("unshare --user nbdinfo --size {uri}");
    assert_eq!(sh(&info), "8388608\n");
    fs::copy(Ca::new().path("ca-cert.pem"), here.join(".pki/libnbd/ca-cert.pem")).unwrap();
    assert!(sh(&format!("{info} 2>&1 || true")).contains("certificate verification"));
}

/// The folders work wherever they are copied to.
#[test]
fn a_server_on_an_address_and_folders_elsewhere() {
    for kind in [P256, ED25519] {
        let ca = Ca::nowhere();
        ca.make(["init", kind]);
        ca.make(["server", "127.0.0.1", "::1", kind]);
        let said = ca.make(["client", "backup", kind]);
        assert!(said.contains("nbds://127.0.0.1/snap.hexz"), "{said}");
        let elsewhere = tempfile::tempdir().unwrap();
        for (from, to) in [("servers/127.0.0.1", "server"), ("clients/backup", "client")] {
            fs::rename(ca.path(from), elsewhere.path().join(to)).unwrap();
        }
        let folder = elsewhere.path().display();
        let server = Server::builder()
            .args(["--tls-cert".to_owned(), format!("{folder}/server/server-cert.pem")])
            .args(["--tls-key".to_owned(), format!("{folder}/server/server-key.pem")])
            .archive("base-zstd.hxz")
            .start();
        let uri = format!("nbds://127.0.0.1:{}/?tls-certificates={folder}/client", server.port());
        assert_eq!(run("nbdinfo", &["--size", &uri]).ok(), "8388608\n");
        let uri = uri.replace("127.0.0.1", "localhost");
        let why = run("nbdinfo", &["--size", &uri]).failed();
        assert!(why.contains("certificate verification"), "{why}");
    }
}

/// A client who came: by which TLS, and with which certificate.
type Came = Result<(ProtocolVersion, CertificateDer<'static>), String>;

/// A server for one client, which lets in only who has a certificate of the CA that isn't
/// revoked, and does no more than the handshake.
fn asking(ca: &Ca) -> (u16, JoinHandle<Came>) {
    let pem = |name: &str| fs::read(ca.path(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem("ca-cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let crl = CertificateRevocationListDer::from_pem_slice(&pem("crl.pem")).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .with_crls([crl])
        .enforce_revocation_expiration()
        .build()
        .unwrap();
    let certificate = pem(&format!("{SERVER}/server-cert.pem"));
    let key = pem(&format!("{SERVER}/server-key.pem"));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(&certificate).unwrap()],
            PrivateKeyDer::from_pem_slice(&key).unwrap(),
        )
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let served = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        handshake(stream, Arc::new(config)).map_err(|error| error.to_string())
    });
    (port, served)
}

fn handshake(
    stream: TcpStream,
    config: Arc<ServerConfig>,
) -> std::io::Result<(ProtocolVersion, CertificateDer<'static>)> {
    // The scripted client's socket, for its deadlines; the roles are exchanged.
    let mut socket = Client::new(Plain::Tcp(stream));
    socket.send(b"NBDMAGICIHAVEOPT\0\x03");
    socket.expect(&3_u32.to_be_bytes());
    socket.expect(b"IHAVEOPT\0\0\0\x05\0\0\0\0");
    socket.send(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0");
    let mut connection = ServerConnection::new(config).unwrap();
    while connection.is_handshaking() {
        if let Err(error) = connection.complete_io(&mut socket.stream) {
            while connection.wants_write() && connection.write_tls(&mut socket.stream).is_ok() {}
            return Err(error);
        }
    }
    let certificate = connection.peer_certificates().unwrap()[0].clone();
    Ok((connection.protocol_version().unwrap(), certificate))
}

/// Makes the command that connects to a port with what is in a folder.
type MakeCommand = dyn Fn(u16, &str) -> Command;

/// Runs a client against a server that asks for its certificate.
fn try_client(ca: &Ca, client: &MakeCommand) -> (Came, Said) {
    let (port, served) = asking(ca);
    let said = run_command(client(port, &ca.text("clients/backup")));
    (served.join().unwrap(), said)
}

fn nbdinfo(port: u16, folder: &str) -> Command {
    let mut command = Command::new("nbdinfo");
    command.arg(format!("nbds://localhost:{port}/x?tls-certificates={folder}"));
    command
}

/// libnbd takes no option for the version of TLS; GnuTLS has a file for it.
fn old_nbdinfo(port: u16, folder: &str) -> Command {
    let priorities = Path::new(folder).join("priorities");
    fs::write(&priorities, "[overrides]\ndisabled-version = tls1.3\n").unwrap();
    let mut command = nbdinfo(port, folder);
    command.env("GNUTLS_SYSTEM_PRIORITY_FILE", priorities);
    command
}

fn qemu_img(port: u16, folder: &str, priority: &str) -> Command {
    let mut command = Command::new("qemu-img");
    command
        .args(["info", "--object"])
        .arg(format!("tls-creds-x509,id=t,endpoint=client,dir={folder},priority={priority}"))
        .arg("--image-opts")
        .arg(format!("driver=nbd,host=localhost,port={port},export=x,tls-creds=t"));
    command
}

/// It speaks TLS 1.2 alone.
fn nbd_client(port: u16, folder: &str) -> Command {
    let mut command = Command::new("nbd-client");
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-l", "localhost", &port.to_string(), "-x", "-H", "localhost"])
        .args(["-A", &format!("{folder}/ca-cert.pem")])
        .args(["-certfile", &format!("{folder}/client-cert.pem")])
        .args(["-keyfile", &format!("{folder}/client-key.pem")]);
    command
}

/// Both kinds of key, both versions of TLS, all clients; and nobody who is revoked. Over TLS
/// 1.2, GnuTLS shows no certificate with an Ed25519 key to a server that isn't OpenSSL's, so
/// nobody is asked for that.
#[test]
fn clients_show_their_certificates() {
    use ProtocolVersion::{TLSv1_2, TLSv1_3};
    let clients: [(ProtocolVersion, &MakeCommand); 5] = [
        (TLSv1_3, &nbdinfo),
        (TLSv1_3, &|port, folder| qemu_img(port, folder, "NORMAL")),
        (TLSv1_2, &old_nbdinfo),
        (TLSv1_2, &|port, folder| qemu_img(port, folder, "NORMAL:-VERS-TLS1.3")),
        (TLSv1_2, &nbd_client),
    ];
    for (of_authority, of_server, of_client) in
        [(P256, P256, P256), (ED25519, P256, P256), (ED25519, ED25519, ED25519)]
    {
        let ca = Ca::nowhere();
        ca.make(["init", of_authority]);
        ca.make(["server", "localhost", of_server]);
        ca.make(["client", "backup", of_client]);
        let pem = fs::read(ca.path("clients/backup/client-cert.pem")).unwrap();
        let certificate = CertificateDer::from_pem_slice(&pem).unwrap();
        let clients = if of_client == ED25519 { &clients[..2] } else { &clients };
        for (version, client) in clients {
            // The server goes after the handshake, so the client doesn't succeed.
            let (came, _) = try_client(&ca, client);
            assert_eq!(came, Ok((*version, certificate.clone())), "{of_authority} {of_client}");
        }
        ca.make(["client", "other", of_client]);
        ca.make(["revoke", "other"]);
        assert!(try_client(&ca, &nbdinfo).0.is_ok());
        ca.make(["revoke", "backup"]);
        for (_, client) in clients {
            let (came, said) = try_client(&ca, client);
            let why = came.unwrap_err();
            assert!(why.contains("Revoked"), "{why}");
            said.failed();
        }
    }
}

/// With a server's key of that kind all of them come, over both versions.
#[test]
fn servers_with_an_ed25519_key() {
    let ca = Ca::nowhere();
    ca.make(["init", ED25519]);
    ca.make(["server", "localhost", ED25519]);
    ca.make(["client", "backup"]);
    let clients: [&MakeCommand; 3] = [&nbdinfo, &old_nbdinfo, &nbd_client];
    for client in clients {
        assert!(try_client(&ca, client).0.is_ok());
    }
}

/// Kills a server when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server's folder is one of qemu's, too. Where a certificate's key usage is critical, qemu
/// refuses its own and others' unless they can encipher keys, which none on a curve can.
#[test]
fn qemu_serves_with_a_servers_folder() {
    let ca = Ca::new();
    ca.make(["server", "localhost"]);
    ca.make(["client", "backup"]);
    let image = ca.path("image");
    fs::write(&image, [7; 4096]).unwrap();
    let socket = ca.path("socket");
    let credentials = format!(
        "tls-creds-x509,id=t,endpoint=server,dir={},verify-peer=on",
        ca.path(SERVER).display()
    );
    let mut qemu = Command::new("qemu-nbd");
    qemu.args(["-f", "raw", "-r", "-t", "-x", "x", "--tls-creds", "t", "--object", &credentials]);
    qemu.arg("-k").arg(&socket).arg(&image).stdin(Stdio::null());
    let _running = Running(qemu.spawn().unwrap());
    crate::support::wait_until("qemu-nbd listens", || socket.exists());
    let [socket, client, server] = ["socket", "clients/backup", SERVER].map(|name| ca.text(name));
    let options = format!("driver=nbd,path={socket},export=x,tls-creds=t,tls-hostname=localhost");
    let read = |folder: &str| {
        let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={folder}");
        run("qemu-img", &["info", "--object", &credentials, "--image-opts", &options])
    };
    assert!(read(&client).ok().contains("4 KiB"));
    // The server's own certificate is no client's.
    read(&server).failed();
}
