//! The gateway and its peers, started on the same image.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustls::ClientConfig;

use crate::client::Target;
use crate::material::Material;

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::enum_variant_names, reason = "two of them are called so")]
pub(crate) enum Server {
    /// hexz-nbd on the archive.
    HexzNbd,
    /// nbdkit on the raw image.
    Nbdkit,
    /// qemu-nbd on a qcow2 compressed with zstd.
    QemuNbd,
    /// nbd-server on the raw image.
    NbdServer,
    /// Hexz's own server on the archive.
    HexzServer,
}

impl Server {
    pub(crate) const ALL: [Self; 5] =
        [Self::HexzNbd, Self::Nbdkit, Self::QemuNbd, Self::NbdServer, Self::HexzServer];

    /// Its name, and what it reads.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HexzNbd => "hexz-nbd, archive",
            Self::Nbdkit => "nbdkit, raw image",
            Self::QemuNbd => "qemu-nbd, zstd qcow2",
            Self::NbdServer => "nbd-server, raw image",
            Self::HexzServer => "hexz-server, archive",
        }
    }

    /// What it says its version is.
    pub(crate) fn version(self, material: &Material) -> Result<String> {
        if self == Self::QemuNbd {
            ensure!(material.qcow2.exists(), "there is no {}", material.qcow2.display());
        }
        let (mut command, argument) = match self {
            Self::HexzNbd => (Command::new(&material.hexz_nbd), "--version"),
            Self::Nbdkit => (Command::new("nbdkit"), "--version"),
            Self::QemuNbd => (Command::new("qemu-nbd"), "--version"),
            Self::NbdServer => (Command::new("nbd-server"), "-V"),
            Self::HexzServer => (Command::new(&material.hexz_peer), "version"),
        };
        first_line(command.arg(argument)).with_context(|| format!("run {}", self.name()))
    }
}

/// The first line that a program says.
pub(crate) fn first_line(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// How clients talk to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tls,
    Plain,
}

impl Transport {
    /// Returns what names of rows say of it: nothing for TLS.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Tls => "",
            Self::Plain => ", no TLS",
        }
    }
}

/// A server that runs until this is dropped.
pub(crate) struct Running {
    child: Option<Child>,
    pub(crate) server: Server,
    pub(crate) group: u32,
    pub(crate) target: Target,
}

/// A server as it is to be started.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) server: Server,
    pub(crate) transport: Transport,
    /// What is asked of the gateway beyond its defaults.
    arguments: Vec<String>,
    /// Another archive than the usual one.
    archive: Option<PathBuf>,
}

impl Setup {
    pub(crate) fn new(server: Server, transport: Transport) -> Self {
        Self { server, transport, arguments: Vec::new(), archive: None }
    }

    pub(crate) fn tls(server: Server) -> Self {
        Self::new(server, Transport::Tls)
    }

    pub(crate) fn plain(server: Server) -> Self {
        Self::new(server, Transport::Plain)
    }

    /// Nothing that was read once has to be read again.
    pub(crate) fn with_room_for_all(self) -> Self {
        self.with(&["--cache-size", "2GiB"])
    }

    pub(crate) fn with(mut self, arguments: &[&str]) -> Self {
        if self.server == Server::HexzNbd {
            self.arguments.extend(arguments.iter().map(ToString::to_string));
        }
        self
    }

    pub(crate) fn of(mut self, archive: &Path) -> Self {
        self.archive = Some(archive.to_owned());
        self
    }
}

impl Running {
    /// Starts a server, and waits until it accepts connections.
    pub(crate) fn start(setup: &Setup, material: &Material) -> Result<Self> {
        let server = setup.server;
        let port = free_port()?;
        let tls = setup.transport == Transport::Tls;
        let command = match server {
            Server::HexzNbd => hexz_nbd(tls, port, setup, material),
            Server::Nbdkit => nbdkit(tls, port, material),
            Server::QemuNbd => qemu_nbd(tls, port, material),
            Server::NbdServer => nbd_server(tls, port, material)?,
            Server::HexzServer => hexz_server(port, material),
        };
        let log = fs::File::create(material.folder.join("server.log"))?;
        let mut command = ending_with_this_program(&command);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().with_context(|| format!("start {}", server.name()))?;
        let group = child.id();
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let export = match server {
            Server::NbdServer => "image".to_owned(),
            _ => String::new(),
        };
        let tls = tls.then(|| Arc::clone(&material.client_tls));
        let mut running =
            Self { child: Some(child), server, group, target: Target { address, tls, export } };
        running.wait_until_ready(server, material)?;
        if server == Server::NbdServer {
            // It has gone into the background, as the leader of a group of its own.
            running.group = fs::read_to_string(pid_file(material))?.trim().parse()?;
        }
        Ok(running)
    }

    fn wait_until_ready(&mut self, server: Server, material: &Material) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(self.target.address).is_err() {
            let ended = match &mut self.child {
                Some(child) => child.try_wait()?.is_some_and(|status| !status.success()),
                None => false,
            };
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(material.folder.join("server.log"))?;
                bail!("{} doesn't start: {log}", server.name());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends it, and returns what it wrote to its log.
    pub(crate) fn end(mut self, material: &Material) -> Result<String> {
        self.stop();
        Ok(fs::read_to_string(material.folder.join("server.log"))?)
    }

    fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let group = i32::try_from(self.group).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(3);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A group of its own, by which its processor time is counted, doesn't get Ctrl-C.
fn ending_with_this_program(command: &Command) -> Command {
    let mut wrapped = Command::new("setpriv");
    wrapped.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program());
    wrapped.args(command.get_args());
    wrapped
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn hexz_nbd(tls: bool, port: u16, setup: &Setup, material: &Material) -> Command {
    let mut command = Command::new(&material.hexz_nbd);
    command.arg("--listen").arg(format!("127.0.0.1:{port}"));
    if tls {
        command.arg("--tls-cert").arg(material.pki.join("server-cert.pem"));
        command.arg("--tls-key").arg(material.pki.join("server-key.pem"));
    }
    // All clients are on this machine, and begin as many connections as they can.
    command.args(["--connection-rate", "1000000"]);
    command.args(&setup.arguments);
    command.arg(setup.archive.as_deref().unwrap_or(&material.archive));
    command
}

fn nbdkit(tls: bool, port: u16, material: &Material) -> Command {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--readonly", "--ipaddr", "127.0.0.1"]);
    command.arg("--port").arg(port.to_string());
    if tls {
        command.arg("--tls=require").arg(option("--tls-certificates=", &material.pki));
    }
    command.arg("file").arg(&material.image);
    command
}

fn qemu_nbd(tls: bool, port: u16, material: &Material) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--read-only", "--persistent", "--shared=0", "--bind=127.0.0.1"]);
    command.arg(format!("--port={port}")).args(["--format=qcow2", "--cache=writeback"]);
    if tls {
        let pki = material.pki.display();
        command
            .arg("--object")
            .arg(format!("tls-creds-x509,id=tls,endpoint=server,dir={pki},verify-peer=off"));
        command.arg("--tls-creds=tls");
    }
    command.arg(&material.qcow2);
    command
}

fn nbd_server(tls: bool, port: u16, material: &Material) -> Result<Command> {
    let mut text = format!("[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n");
    if tls {
        let pki = material.pki.display();
        text += &format!(
            // Its own default is TLS 1.2 alone.
            "force_tls = true\ntlsprio = NORMAL\ncertfile = {pki}/server-cert.pem\nkeyfile = {pki}/server-key.pem\n\
             cacertfile = {pki}/ca-cert.pem\n"
        );
    }
    text += &format!("[image]\nexportname = {}\nreadonly = true\n", material.image.display());
    let file = material.folder.join("nbd-server.conf");
    fs::write(&file, text)?;
    // That of a run before would be taken for the new one's.
    let _ = fs::remove_file(pid_file(material));
    let mut command = Command::new("nbd-server");
    command.arg("-C").arg(file).arg("-p").arg(pid_file(material));
    Ok(command)
}

fn pid_file(material: &Material) -> PathBuf {
    material.folder.join("nbd-server.pid")
}

fn hexz_server(port: u16, material: &Material) -> Command {
    let mut command = Command::new(&material.hexz_peer);
    command.arg("serve").arg(&material.archive).arg(port.to_string());
    command
}

fn option(name: &str, path: &Path) -> String {
    format!("{name}{}", path.display())
}

/// The client's side of TLS: it trusts the CA that the servers' certificate is from. It has
/// a certificate as well, for nbd-server, which wants one; the server's will do.
pub(crate) fn client_tls(pki: &Path, resumption: bool) -> Result<Arc<ClientConfig>> {
    let pem = |name: &str| {
        let file = pki.join(name);
        fs::read(&file).with_context(|| format!("read {}", file.display()))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_pemfile::certs(&mut pem("ca-cert.pem")?.as_slice()) {
        roots.add(certificate?)?;
    }
    let own = rustls_pemfile::certs(&mut pem("server-cert.pem")?.as_slice())
        .collect::<Result<Vec<_>, _>>()?;
    let key = rustls_pemfile::private_key(&mut pem("server-key.pem")?.as_slice())?;
    let mut config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(roots)
        .with_client_auth_cert(own, key.context("there is no key in server-key.pem")?)?;
    if !resumption {
        config.resumption = rustls::client::Resumption::disabled();
    }
    Ok(Arc::new(config))
}
