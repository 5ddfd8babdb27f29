//! What the tests share: the built binary, a throw-away PKI, a scripted client.
#![allow(dead_code, reason = "not every module of tests needs everything")]

pub mod authority;
pub mod binary;
pub mod client;
pub mod openssl;
pub mod pki;
pub mod server;
pub mod stream;
pub mod structured;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use aws_lc_rs::digest;

use server::Server;

/// Long enough for a busy machine; nothing waits longer before it counts as failed. It is
/// shorter than the server's own deadlines for a handshake (30 s), so that a test that
/// expects a connection to be closed for what was sent doesn't take the deadline for that.
pub const PATIENCE: Duration = Duration::from_secs(25);

/// What the main stream of `base-*`, `sparse-*`, `fixed-*` and `encrypted-*` reads as.
pub const IMAGE_SIZE: u64 = 8_388_608;
pub const IMAGE_SHA256: &str = "f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c";

/// The password of the encrypted archives.
pub const PASSWORD: &str = "correct horse battery staple";

pub fn archive(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archives").join(name)
}

/// Whether the tests run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn sha256(bytes: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of the base image, which its known SHA-256 has vouched for.
pub fn image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let server = Server::start([archive("base-zstd.hxz")]);
        let image = server.go("").read_ok(0, IMAGE_SIZE as u32);
        assert_eq!(sha256(&image), IMAGE_SHA256);
        image
    })
}

/// Held by tests that care who has the port that NBD has by default.
pub fn nbd_port() -> MutexGuard<'static, ()> {
    static PORT: Mutex<()> = Mutex::new(());
    PORT.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits until `done` says so.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Numbers that look random and are the same in every run (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.number() >> 16) % end
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| (self.number() >> 32) as u8).collect()
    }
}

#[test]
fn the_support_works() {
    assert_eq!(image().len() as u64, IMAGE_SIZE);
    for pki in [pki::Pki::new(), pki::Pki::rsa(), pki::Pki::with_intermediate()] {
        let mut server = Server::builder().archive("base-zstd.hxz").tls(pki).start();
        server.assert_alive();
        assert!(server.fd_count() > 3 && server.rss_kib() > 0);
        assert_eq!(server.terminate().code(), Some(0));
    }
}
