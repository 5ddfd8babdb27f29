//! The built binary as a child process.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::PATIENCE;
use super::authority::Authority;
pub use super::binary::{Ended, run, run_to_failure};
use super::binary::{binary_in, run_command, wait};
use super::client::{Client, Plain, Session, connect_from};
use super::pki::Pki;

/// What a server is started with.
pub struct Builder {
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    listen: Vec<String>,
    /// Whether it binds sockets itself, and where if nothing else is said.
    listens: bool,
    /// A program and its arguments, which runs the server.
    wrapper: Vec<OsString>,
    stdio: Option<(Stdio, Stdio)>,
    pki: Option<Arc<Pki>>,
    bare: bool,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// By its port, and perhaps its context ID.
    Vsock(String),
    /// The connection that it was started with.
    Stdio,
}

/// A running server. It is killed when this is dropped.
pub struct Server {
    child: Child,
    lines: Arc<Mutex<Vec<Line>>>,
    reader: Option<JoinHandle<()>>,
    addresses: Vec<Address>,
    pki: Option<Arc<Pki>>,
}

/// A line of the server's log.
#[derive(Debug, Clone)]
pub struct Line {
    pub text: String,
    /// The fields; null if the line isn't JSON.
    pub json: Value,
}

impl Builder {
    /// Another argument; the archive is one of them.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// One of the archives in the repository.
    pub fn archive(self, name: &str) -> Self {
        self.arg(super::archive(name))
    }

    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Gives it nothing but the arguments that are named: a configuration file has the rest.
    pub fn bare(mut self) -> Self {
        self.bare = true;
        self
    }

    /// Where to listen, instead of any port of 127.0.0.1 [repeatable].
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen.push(address.into());
        self
    }

    /// It listens nowhere by itself.
    pub fn without_listening(mut self) -> Self {
        self.listens = false;
        self
    }

    /// It is run by that program, with these arguments before its own.
    pub fn within<A: Into<OsString>>(mut self, wrapper: impl IntoIterator<Item = A>) -> Self {
        self.wrapper = wrapper.into_iter().map(Into::into).collect();
        self
    }

    /// What its standard input and output are.
    pub fn stdio(mut self, input: impl Into<Stdio>, output: impl Into<Stdio>) -> Self {
        self.stdio = Some((input.into(), output.into()));
        self
    }

    pub fn listen_unix(self, path: &Path) -> Self {
        self.listen(format!("unix:{}", path.display()))
    }

    /// Serve over TLS with that certificate and key; clients trust that CA.
    pub fn tls(mut self, pki: Pki) -> Self {
        self = self.arg("--tls-cert").arg(pki.server_cert()).arg("--tls-key").arg(pki.server_key());
        self.pki = Some(Arc::new(pki));
        self
    }

    /// Ask clients for certificates of that CA that it hasn't revoked.
    pub fn clients_of(self, authority: &Authority) -> Self {
        self.arg("--tls-client-ca")
            .arg(authority.certificate())
            .arg("--tls-client-crl")
            .arg(authority.revocation_list())
    }

    fn command(&self) -> Command {
        let mut command = binary_in(&self.wrapper);
        if self.bare {
            command.args(&self.args).envs(self.env.iter().cloned());
            return command;
        }
        command.args(["--log-format", "json"]);
        let default = ["127.0.0.1:0".to_owned()];
        let is_default = self.listen.is_empty() && self.listens;
        for address in if is_default { &default[..] } else { &self.listen } {
            command.args(["--listen", address]);
        }
        // Only root may look into /proc/PID/fd and the like of a process that hides its memory,
        // as many tests do. Those of the sandbox itself say what they want.
        let says = self.args.iter().any(|arg| arg == "--sandbox");
        if !says && !super::is_root() {
            command.args(["--sandbox", "off"]);
        }
        command.args(&self.args).envs(self.env.iter().cloned());
        command
    }

    /// Starts it, and waits until it says that it is ready.
    pub fn start(mut self) -> Server {
        let mut command = self.command();
        let (input, output) = self.stdio.take().unwrap_or_else(|| (Stdio::null(), Stdio::null()));
        let mut child = command.stdin(input).stdout(output).stderr(Stdio::piped()).spawn().unwrap();
        // It holds what the child was given.
        drop(command);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let reader = std::thread::spawn({
            let lines = Arc::clone(&lines);
            move || {
                for text in stderr.lines().map_while(Result::ok) {
                    let json = serde_json::from_str(&text).unwrap_or(Value::Null);
                    lock(&lines).push(Line { text, json });
                }
            }
        });
        let reader = Some(reader);
        let mut server = Server { child, lines, reader, addresses: Vec::new(), pki: self.pki };
        // If it ends instead, so does the log.
        let ready = server.wait_for_log("it is ready", |line| line.json["listen"].is_string());
        let listen = ready.json["listen"].as_str().unwrap_or_else(|| panic!("{}", ready.text));
        server.addresses = match listen.starts_with("standard input") {
            true => vec![Address::Stdio],
            false => listen.split(", ").map(Address::parse).collect(),
        };
        server
    }

    /// Runs it; it must end by itself.
    pub fn run(mut self) -> Ended {
        let mut command = self.command();
        let (input, output) = self.stdio.take().unzip();
        command.stdin(input.unwrap_or_else(Stdio::null));
        run_command(command, output)
    }

    /// Runs it; it must refuse to start, with this exit code and label. Returns the message.
    pub fn fails_with(self, code: i32, reason: &str) -> String {
        let (ended, stderr) = self.fail();
        let last = stderr.lines().next_back().unwrap_or_default();
        let line = Line { text: last.to_owned(), json: serde_json::from_str(last).expect(&stderr) };
        assert_eq!((ended, line.reason()), (code, reason), "{stderr}");
        line.message().to_owned()
    }

    /// Runs it; it must refuse to start.
    pub fn fail(self) -> (i32, String) {
        let ended = self.run();
        let code = ended.code.expect("ended by a signal");
        assert_ne!(code, 0, "it should have failed: {}", ended.stderr);
        (code, ended.stderr)
    }
}

impl Address {
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some(("unix", path)) => Self::Unix(path.into()),
            Some(("vsock", port)) => Self::Vsock(port.to_owned()),
            _ => Self::Tcp(text.parse().unwrap()),
        }
    }
}

impl Line {
    pub fn message(&self) -> &str {
        self.json["message"].as_str().unwrap_or_default()
    }

    /// The label of the line, if it has one.
    pub fn reason(&self) -> &str {
        self.json["reason"].as_str().unwrap_or_default()
    }

    /// Whether it says that a connection was refused or failed.
    pub fn is_failure(&self) -> bool {
        self.json["id"].is_u64() && self.json["reason"].is_string() && self.json["level"] == "WARN"
    }

    /// Whether it says that a client starts reading.
    pub fn is_reading(&self) -> bool {
        self.json["tls"].is_string() && self.json["export"].is_string()
    }
}

impl Server {
    pub fn builder() -> Builder {
        Builder {
            args: Vec::new(),
            env: Vec::new(),
            listen: Vec::new(),
            listens: true,
            wrapper: Vec::new(),
            stdio: None,
            pki: None,
            bare: false,
        }
    }

    /// Starts a server without TLS on any port of 127.0.0.1.
    pub fn start<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Self {
        Self::builder().args(args).start()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The first TCP address.
    pub fn address(&self) -> SocketAddr {
        let tcp = |address: &Address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) | Address::Vsock(_) | Address::Stdio => None,
        };
        self.addresses.iter().find_map(tcp).expect("it listens on no TCP address")
    }

    pub fn port(&self) -> u16 {
        self.address().port()
    }

    pub fn has_tls(&self) -> bool {
        self.pki.is_some()
    }

    /// The PKI that it was started with.
    pub fn pki(&self) -> &Pki {
        self.pki.as_ref().expect("it runs without TLS")
    }

    /// Connects in clear; nothing is sent or read yet.
    pub fn connect(&self) -> Client<Plain> {
        match &self.addresses[0] {
            Address::Tcp(address) => {
                Client::new(Plain::Tcp(TcpStream::connect_timeout(address, PATIENCE).unwrap()))
            }
            Address::Unix(path) => Client::new(Plain::Unix(UnixStream::connect(path).unwrap())),
            Address::Vsock(_) => panic!("nobody connects by vsock here"),
            Address::Stdio => panic!("it listens nowhere"),
        }
    }

    /// Connects by TCP from that address of this machine.
    pub fn connect_from(&self, source: impl Into<IpAddr>) -> Client<Plain> {
        Client::new(Plain::Tcp(connect_from(source.into(), self.address())))
    }

    /// A client that has greeted, and runs inside TLS if the server requires that.
    pub fn greeted(&self) -> Client<Session> {
        let mut client = self.connect();
        client.greet(super::client::FLAGS);
        match &self.pki {
            Some(pki) => client.starttls(pki.client_config()).boxed(),
            None => client.boxed(),
        }
    }

    /// A client that has chosen an export with GO.
    pub fn go(&self, name: &str) -> Client<Session> {
        let mut client = self.greeted();
        client.go(name);
        client
    }

    /// Whether a client can come in, choose the default export and read a byte.
    pub fn assert_alive(&self) {
        let mut client = self.go("");
        client.read_ok(0, 1);
        client.disconnect();
    }

    pub fn log(&self) -> Vec<Line> {
        lock(&self.lines).clone()
    }

    pub fn log_text(&self) -> String {
        self.log().iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// The first line, from the beginning, that `wanted` accepts.
    pub fn wait_for_log(&self, what: &str, wanted: impl Fn(&Line) -> bool) -> Line {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = lock(&self.lines).iter().find(|line| wanted(line)) {
                return line.clone();
            }
            let reading = self.reader.as_ref().is_some_and(|reader| !reader.is_finished());
            let in_time = reading && Instant::now() < deadline;
            assert!(in_time, "nothing in the log says that {what}:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The first line whose field `name` has that value.
    pub fn wait_for_field(&self, name: &str, value: &str) -> Line {
        self.wait_for_log(&format!("{name} is {value}"), |line| line.json[name] == value)
    }

    /// The first line about a refusal or failure whose cause has that label.
    pub fn wait_for_cause(&self, cause: &str) -> Line {
        self.wait_for_field("cause", cause)
    }

    /// The first line about a session that ended like that.
    pub fn wait_for_how(&self, how: &str) -> Line {
        self.wait_for_field("how", how)
    }

    /// The first line about a client that starts reading.
    pub fn wait_for_reading(&self) -> Line {
        self.wait_for_log("a client reads", Line::is_reading)
    }

    /// How many reloads took effect so far.
    pub fn reloads(&self) -> usize {
        self.log().iter().filter(|line| line.json["dropped"].is_u64()).count()
    }

    pub fn wait_for_reloads(&self, times: usize) {
        super::wait_until("it is reloaded", || self.reloads() >= times);
    }

    /// The first line whose message, or error text, contains `text`.
    pub fn wait_for_message(&self, text: &str) -> Line {
        self.wait_for_log(text, |line| line.message().contains(text))
    }

    /// The first line with this label.
    pub fn wait_for_reason(&self, reason: &str) -> Line {
        self.wait_for_field("reason", reason)
    }

    /// Whether the log has a line with this label so far.
    pub fn has_reason(&self, reason: &str) -> bool {
        self.log().iter().any(|line| line.reason() == reason)
    }

    /// Its resident memory, in KiB.
    pub fn rss_kib(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// Its peak of resident memory, in KiB.
    pub fn peak_rss_kib(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> u64 {
        number_after(&self.proc("status"), field)
    }

    /// Bytes that it has read from files; what comes from sockets isn't counted.
    pub fn file_bytes_read(&self) -> u64 {
        number_after(&self.proc("io"), "rchar:")
    }

    /// How many descriptors it has open.
    pub fn fd_count(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Processor time that it has used so far, in ticks of the kernel's clock (10 ms).
    pub fn cpu_time(&self) -> Duration {
        let stat = self.proc("stat");
        // The second field is a name in parentheses, which may hold spaces.
        let fields: Vec<&str> =
            stat[stat.rfind(')').unwrap() + 2..].split_ascii_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(10 * ticks)
    }

    /// Processor time that each of its threads has used so far, in ticks, by the thread's
    /// number and with its name. Those that have ended are missing.
    pub fn cpu_by_thread(&self) -> HashMap<u32, (String, u64)> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let thread = |path: PathBuf| {
            let stat = std::fs::read_to_string(path.join("stat")).ok()?;
            let (start, end) = (stat.find('(')?, stat.rfind(')')?);
            let fields: Vec<&str> = stat.get(end + 2..)?.split_ascii_whitespace().collect();
            let ticks = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
            let id = path.file_name()?.to_str()?.parse().ok()?;
            Some((id, (stat.get(start + 1..end)?.to_owned(), ticks)))
        };
        threads.filter_map(|entry| thread(entry.ok()?.path())).collect()
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid())).unwrap()
    }

    /// Sends a signal, such as "TERM".
    pub fn signal(&self, name: &str) {
        // The shell's own kill: the program of that name isn't everywhere.
        let kill = format!("kill -{name} {}", self.pid());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, which must come soon; then the log is complete.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait(&mut self.child, PATIENCE);
        let status = status.unwrap_or_else(|| panic!("it doesn't end:\n{}", self.log_text()));
        self.join();
        status
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait()
    }

    fn join(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.join();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log_text());
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "server {} on {:?}", self.pid(), self.addresses)
    }
}

fn lock(lines: &Mutex<Vec<Line>>) -> MutexGuard<'_, Vec<Line>> {
    lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn number_after(text: &str, field: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}
