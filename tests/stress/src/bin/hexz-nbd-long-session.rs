//! Reads more over one TLS 1.2 connection than AES-GCM may protect with one key (256 GiB), with
//! the cipher suites that nbd-client 3.24 offers, in its order.
//!
//! The program is started on an archive of the tests, which is read again and again from its
//! cache. What comes is counted by the headers of its TLS records and not decrypted, so that the
//! client takes little of the processor. The session has to last; with `--aes-gcm-only` the
//! server has to end it before the limit, and to log and audit that as `tls_key_limit`.

use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suites};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::TLS12;
use rustls::{CipherSuite, ClientConfig, ClientConnection, RootCertStore, Stream};
use serde_json::Value;

const GIB: u64 = 1 << 30;
/// Length of a read, and number of reads in flight.
const LENGTH: u32 = 4 << 20;
const IN_FLIGHT: u64 = 8;
/// The size of the archive's image is a multiple of the length.
const OFFSETS: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

/// Reads hundreds of GiB over one TLS 1.2 connection
#[derive(Debug, Parser)]
struct Options {
    /// The program
    #[arg(long, default_value = "target/release/hexz-nbd")]
    server: PathBuf,
    /// An archive of 8 MiB at the least
    #[arg(long, default_value = "tests/archives/base-zstd.hxz")]
    archive: PathBuf,
    /// GiB of ciphertext after which the session may end
    #[arg(long, default_value_t = 258)]
    gib: u64,
    /// Offer no ChaCha20-Poly1305
    #[arg(long)]
    aes_gcm_only: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hexz-nbd-long-session: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(options, folder.path())?;
    let (mut stream, mut session) = connect(options, folder.path())?;
    let suite = session.negotiated_cipher_suite().context("no cipher suite")?.suite();
    println!("{suite:?}, {} GiB to read", options.gib);
    let began = Instant::now();
    let read = read(&mut stream, &mut session, suite, options.gib * GIB)?;
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{:.2} GiB in {} records and {seconds:.0} s, {:.2} GiB/s{}",
        gib(read.ciphertext),
        read.records,
        gib(read.ciphertext) / seconds,
        if read.is_ended { "; then the server ended the session" } else { "" },
    );
    drop(stream);
    let how = server.ended()?;
    println!("the server says: {how}");
    if options.aes_gcm_only {
        ensure!(read.is_ended && how == "tls_key_limit", "the session had to end at the limit");
    } else {
        ensure!(!read.is_ended, "the session had to last");
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}

struct Server {
    child: Child,
    audit: PathBuf,
}

impl Server {
    fn start(options: &Options, folder: &Path) -> Result<Self> {
        let at = |name: &str| folder.join(name);
        for words in [["init"].as_slice(), &["server", "localhost"]] {
            let made = Command::new(&options.server)
                .args(["pki", "--dir"])
                .arg(at("pki"))
                .args(words)
                .stdout(Stdio::null())
                .status()?;
            ensure!(made.success(), "no certificates");
        }
        let audit = at("audit.jsonl");
        let certificates = at("pki/servers/localhost");
        let child = Command::new(&options.server)
            .arg("--listen")
            .arg(format!("unix:{}", at("nbd.sock").display()))
            .arg("--tls-cert")
            .arg(certificates.join("server-cert.pem"))
            .arg("--tls-key")
            .arg(certificates.join("server-key.pem"))
            .arg("--audit")
            .arg(&audit)
            .arg(&options.archive)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(at("log"))?)
            .spawn()
            .with_context(|| format!("{} can't be run", options.server.display()))?;
        let server = Self { child, audit };
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(at("nbd.sock")).is_err() {
            let log = || fs::read_to_string(at("log")).unwrap_or_default();
            ensure!(Instant::now() < until, "the server doesn't listen: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// How the session ended, as it was audited.
    fn ended(&self) -> Result<String> {
        let until = Instant::now() + PATIENCE;
        loop {
            let events = fs::read_to_string(&self.audit)?;
            let events = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut ended = events.filter(|event| event["event"] == "ended");
            if let Some(ended) = ended.find(|event| event["export"].is_string()) {
                return Ok(ended["how"].as_str().unwrap_or_default().to_owned());
            }
            ensure!(Instant::now() < until, "the end isn't in the audit");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _told = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _status = self.child.wait();
    }
}

/// TLS 1.2 and the suites that nbd-client offers, as far as they are spoken here.
fn config(options: &Options, authority: &Path) -> Result<Arc<ClientConfig>> {
    let mut offered = vec![
        suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ];
    if options.aes_gcm_only {
        offered.retain(|suite| !is_chacha20(suite.suite()));
    }
    let provider = CryptoProvider { cipher_suites: offered, ..aws_lc_rs::default_provider() };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority)?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS12])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn is_chacha20(suite: CipherSuite) -> bool {
    suite.as_str().is_some_and(|name| name.contains("CHACHA20"))
}

/// Greeting, STARTTLS, handshake, and GO to the default export.
fn connect(options: &Options, folder: &Path) -> Result<(UnixStream, ClientConnection)> {
    const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
    const STARTTLS: u32 = 5;
    const GO: u32 = 7;
    const ACK: u32 = 1;
    let mut stream = UnixStream::connect(folder.join("nbd.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_exact(&mut [0; 18])?;
    stream.write_all(&FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes())?;
    stream.write_all(&option(STARTTLS, &[]))?;
    ensure!(reply(&mut stream)? == ACK, "STARTTLS was refused");
    let config = config(options, &folder.join("pki/ca-cert.pem"))?;
    let mut session = ClientConnection::new(config, ServerName::try_from("localhost")?)?;
    let mut tls = Stream::new(&mut session, &mut stream);
    // No name, no requests for information.
    tls.write_all(&option(GO, &[0; 6]))?;
    loop {
        match reply(&mut tls)? {
            ACK => return Ok((stream, session)),
            kind if kind & (1 << 31) == 0 => {}
            kind => bail!("GO was refused: {kind:#x}"),
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

/// The kind of the next reply to an option.
fn reply(stream: &mut impl Read) -> Result<u32> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let number =
        |at: usize| head.iter().skip(at).take(4).fold(0, |sum, byte| sum << 8 | u32::from(*byte));
    let mut data = vec![0; usize::try_from(number(16).min(1 << 16))?];
    stream.read_exact(&mut data)?;
    Ok(number(12))
}

#[derive(Debug, Default)]
struct Seen {
    ciphertext: u64,
    records: u64,
    /// The server ended it.
    is_ended: bool,
}

/// Reads until there was so much, or the server ends the session.
fn read(
    stream: &mut UnixStream,
    session: &mut ClientConnection,
    suite: CipherSuite,
    bytes: u64,
) -> Result<Seen> {
    const HEADER: u64 = 5;
    const APPLICATION_DATA: u8 = 23;
    const REPLY: u64 = 16;
    // An explicit nonce and a tag, or a tag.
    let overhead = if is_chacha20(suite) { 16 } else { 24 };
    let mut input = BufReader::with_capacity(1 << 20, stream.try_clone()?);
    let mut seen = Seen::default();
    let (mut plaintext, mut asked) = (0, 0);
    let mut body = vec![0; 1 << 15];
    while seen.ciphertext < bytes {
        while asked < plaintext / (REPLY + u64::from(LENGTH)) + IN_FLIGHT {
            session.writer().write_all(&request(asked))?;
            while session.wants_write() {
                session.write_tls(stream)?;
            }
            asked += 1;
        }
        let mut header = [0; 5];
        if input.read_exact(&mut header).is_err() {
            seen.is_ended = true;
            break;
        }
        let [kind, _, _, high, low] = header;
        let length = u16::from_be_bytes([high, low]);
        let record = body.get_mut(..usize::from(length)).context("a record that is too long")?;
        input.read_exact(record)?;
        if kind != APPLICATION_DATA {
            seen.is_ended = true;
            break;
        }
        plaintext += u64::from(length).saturating_sub(overhead);
        seen.ciphertext += HEADER + u64::from(length);
        seen.records += 1;
    }
    Ok(seen)
}

fn request(cookie: u64) -> Vec<u8> {
    const MAGIC: u32 = 0x2560_9513;
    let offset = cookie % OFFSETS * u64::from(LENGTH);
    // No flags, READ.
    [
        MAGIC.to_be_bytes().as_slice(),
        &[0; 4],
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &LENGTH.to_be_bytes(),
    ]
    .concat()
}
