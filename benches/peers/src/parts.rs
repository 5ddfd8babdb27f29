//! What serving cold can't do without: each part alone, on one thread, with its memory warm.

use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use anyhow::{Result, anyhow, ensure};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use hexz_reader::{OpenOptions, Snapshot, StreamKind};
use rustix::time::{ClockId, clock_gettime};

use crate::bench::median_of;
use crate::material::Material;

/// Seconds of processor time for the whole image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// Zstandard, each distinct block once.
    pub(crate) decode: f64,
    /// CRC-32 of what is stored and BLAKE3 of what it becomes.
    pub(crate) checks: f64,
    /// AES-256-GCM in TLS records, of all data.
    pub(crate) encrypt: f64,
    /// Writing it to a socket on loopback, the sender's side.
    pub(crate) socket: f64,
}

impl Parts {
    pub(crate) fn sum(&self) -> f64 {
        self.decode + self.checks + self.encrypt + self.socket
    }

    /// Each with its name.
    pub(crate) fn named(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("Zstandard", self.decode),
            ("CRC-32 and BLAKE3", self.checks),
            ("AES-256-GCM", self.encrypt),
            ("socket", self.socket),
        ]
    }

    /// What of it falls to each, if it is shared by so many.
    pub(crate) fn by(self, shares: f64) -> Self {
        Self {
            decode: self.decode / shares,
            checks: self.checks / shares,
            encrypt: self.encrypt / shares,
            socket: self.socket / shares,
        }
    }

    pub(crate) fn medians(all: &[Self]) -> Self {
        Self {
            decode: median_of(all, |parts| parts.decode),
            checks: median_of(all, |parts| parts.checks),
            encrypt: median_of(all, |parts| parts.encrypt),
            socket: median_of(all, |parts| parts.socket),
        }
    }

    pub(crate) fn measure(material: &Material) -> Result<Self> {
        let snapshot = Snapshot::open(&material.archive, &OpenOptions::default())?;
        let mut seen = std::collections::HashSet::new();
        let mut codec = zstd::bulk::Decompressor::new()?;
        let (mut decode, mut checks, mut data, mut at) = (0.0, 0.0, 0, 0);
        let mut decoded = Vec::with_capacity(1 << 20);
        while at < snapshot.size(StreamKind::Main) {
            let block = snapshot.locate(StreamKind::Main, at)?;
            at = block.end();
            if block.is_zeros() {
                continue;
            }
            data += u64::from(block.length());
            if !seen.insert(block.hash()) {
                continue;
            }
            let bytes = snapshot.read_block(&block)?;
            // The same packer's work again: level 3 is its only level.
            let stored = zstd::bulk::compress(&bytes, 3)?;
            decoded.clear();
            decode += timed(|| codec.decompress_to_buffer(&stored, &mut decoded))?.0;
            let (seconds, _) = timed(|| {
                std::hint::black_box((crc32fast::hash(&stored), blake3::hash(&decoded)));
                Ok::<_, std::io::Error>(())
            })?;
            checks += seconds;
            ensure!(decoded == bytes, "a block doesn't survive being packed again");
        }
        Ok(Self { decode, checks, encrypt: encrypt(data)?, socket: socket(data)? })
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the parts, in seconds for each GiB:")?;
        for (position, (name, seconds)) in self.named().into_iter().enumerate() {
            write!(f, "{} {name} {seconds:.2}", if position > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// The processor time of this thread that `work` takes, in seconds.
fn timed<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<(f64, T), E> {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let before = now();
    let done = work()?;
    Ok((now() - before, done))
}

/// A TLS record's payload, in bytes.
const RECORD: usize = 16 * 1024;

fn encrypt(length: u64) -> Result<f64> {
    let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| anyhow!("no key"))?;
    let key = LessSafeKey::new(key);
    let mut record = vec![0; RECORD];
    let (seconds, ()) = timed(|| {
        for number in 0..length / RECORD as u64 {
            let mut nonce = [0; NONCE_LEN];
            nonce[4..].copy_from_slice(&number.to_be_bytes());
            let nonce = Nonce::assume_unique_for_key(nonce);
            let sealed =
                key.seal_in_place_separate_tag(nonce, Aad::from([23, 3, 3, 64, 17]), &mut record);
            let _tag = std::hint::black_box(sealed.map_err(|_| anyhow!("encryption fails"))?);
        }
        Ok::<_, anyhow::Error>(())
    })?;
    Ok(seconds)
}

fn socket(length: u64) -> Result<f64> {
    /// What rustls holds ready for the socket.
    const WRITE: usize = 64 * 1024;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 256 * 1024];
        while receiver.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    let bytes = vec![1; WRITE];
    let (seconds, ()) =
        timed(|| (0..length / WRITE as u64).try_for_each(|_| sender.write_all(&bytes)))?;
    drop(sender);
    reader.join().map_err(|_| anyhow!("the reader panicked"))?;
    Ok(seconds)
}
