//! nginx as the object store, behind a network.

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use object_server::{DelayProxy, Link};
use tempfile::TempDir;

use crate::process::Process;

/// nginx with a configuration of its own, which serves a folder.
pub(crate) struct Nginx {
    process: Process,
    home: TempDir,
}

/// Requests to a store, and the bytes of its responses' bodies.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
}

impl Traffic {
    pub(crate) fn since(self, before: Self) -> Self {
        Self { requests: self.requests - before.requests, bytes: self.bytes - before.bytes }
    }
}

impl Nginx {
    pub(crate) fn start(folder: &Path) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let socket = object_server::listen((Ipv4Addr::LOCALHOST, 0).into())?;
        let port = socket.local_addr()?.port();
        // Its workers read what this user can read.
        let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("    {kind}_temp_path temporary-{kind};\n"))
            .concat();
        let configuration = format!(
            "daemon off;\nworker_processes 1;\n{user}pid nginx.pid;\nerror_log error.log;\n\
             events {{ worker_connections 1024; }}\nhttp {{\n{temporary}    \
             log_format traffic '$body_bytes_sent $status $request_method $uri $http_range';\n    \
             access_log access.log traffic;\n    sendfile on;\n    tcp_nopush on;\n    \
             keepalive_requests 1000000;\n    server {{\n        listen 127.0.0.1:{port};\n        \
             root \"{}\";\n        autoindex on;\n    }}\n}}\n",
            fs::canonicalize(folder)?.display()
        );
        let file = home.path().join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = Command::new("nginx");
        command.arg("-p").arg(home.path()).arg("-c").arg(file).args(["-e", "error.log"]);
        // It takes over the socket that it finds as its standard input.
        command.env("NGINX", "0;");
        let process = Process::start_with(&command, port, OwnedFd::from(socket).into())?;
        Ok(Self { process, home })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.process.address()
    }

    /// Returns the sums over all requests so far that have ended.
    pub(crate) fn traffic(&self) -> Result<Traffic> {
        // The socket accepts connections even before nginx has opened its log.
        let log = match fs::read_to_string(self.home.path().join("access.log")) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Traffic::default()),
            log => log.context("nginx's access.log")?,
        };
        let mut traffic = Traffic::default();
        for line in log.lines().filter(|line| line.contains(" GET ")) {
            let bytes = line.split(' ').next().unwrap_or_default();
            traffic.bytes += bytes.parse::<u64>().context("nginx's log")?;
            traffic.requests += 1;
        }
        Ok(traffic)
    }

    /// Puts a network between the store and its clients.
    pub(crate) fn behind(&self, link: Link) -> Result<DelayProxy> {
        Ok(DelayProxy::start(self.address(), link)?)
    }
}

/// Returns the URL of a file behind a proxy.
pub(crate) fn url(address: SocketAddr, file: &str) -> String {
    format!("http://{address}/{file}")
}
