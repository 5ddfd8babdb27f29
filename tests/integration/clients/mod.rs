//! The clients that people have, against the built binary. A client that is missing is a
//! failure: `make tools` installs all of them.

mod balancer;
mod changed;
mod contexts;
mod copies;
mod namespaces;
mod queries;
mod restarts;

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::PATIENCE;
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

/// What a client said.
pub struct Said {
    success: bool,
    stdout: String,
    stderr: String,
}

impl Said {
    /// Its output, after it has succeeded.
    pub fn ok(self) -> String {
        assert!(self.success, "it failed: {}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Its output, if it has succeeded.
    pub fn output(&self) -> Option<&str> {
        self.success.then_some(&self.stdout)
    }

    /// All that it said, whether it has succeeded or not.
    pub fn everything(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// What it complained of, after it has failed.
    pub fn failed(self) -> String {
        assert!(!self.success, "it succeeded: {}{}", self.stdout, self.stderr);
        self.stdout + &self.stderr
    }
}

/// Runs a client, which must end soon. Programs are taken from Debian's folders first:
/// nbdsh is a script that needs Debian's Python.
pub fn run(program: &str, args: &[&str]) -> Said {
    run_command(command(program, args))
}

/// Runs a client that may not end by itself.
pub fn run_for(program: &str, args: &[&str], patience: Duration) -> Said {
    let mut limited = vec![patience.as_secs().to_string(), program.to_owned()];
    limited.extend(args.iter().map(|&arg| arg.to_owned()));
    let limited: Vec<&str> = limited.iter().map(String::as_str).collect();
    run_command(command("timeout", &limited))
}

fn command(program: &str, args: &[&str]) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.args(args).env("PATH", format!("/usr/sbin:/usr/bin:/sbin:/bin:{path}"));
    command
}

pub fn run_command(mut command: Command) -> Said {
    let program = command.get_program().to_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program:?} is needed: {error}; try `make tools`"));
    let read = |mut stream: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(Box::new(child.stdout.take().unwrap()));
    let stderr = read(Box::new(child.stderr.take().unwrap()));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{program:?} doesn't end: {}{}", stdout.join().unwrap(), stderr.join().unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Said {
        success: status.success(),
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

/// A server over TLS, as it is used across a network.
fn tls(archive: &str) -> Builder {
    Server::builder().archive(archive).tls(Pki::new())
}

/// The URI of an export for libnbd's programs.
fn uri(server: &Server, export: &str) -> String {
    let folder = server.pki().folder().display();
    format!("nbds://localhost:{}/{export}?tls-certificates={folder}", server.port())
}

/// The arguments by which qemu's programs find an export.
fn qemu(server: &Server, export: &str) -> [String; 4] {
    let folder = server.pki().folder().display();
    [
        "--object".to_owned(),
        format!("tls-creds-x509,id=tls,endpoint=client,dir={folder}"),
        "--image-opts".to_owned(),
        format!("driver=nbd,host=localhost,port={},export={export},tls-creds=tls", server.port()),
    ]
}

/// A folder, and a file's path in it.
fn output() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.img");
    (folder, file)
}
