//! One connection's share of a load.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nbd_server::wire::reply::{ChunkHeader, ErrorCode, ReplyFlags, ReplyType, SimpleReply};
use nbd_server::wire::request::{Command, CommandFlags, Cookie, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::client::Connection;
use crate::load::{Load, Order, Random, Until, histogram};
use crate::measure::hurry;

pub(crate) struct Reader {
    load: Load,
    connection: Connection,
    /// Where reads may begin, in bytes.
    offsets: Arc<[u64]>,
    /// The number of the next read, perhaps shared with other connections.
    next: Arc<AtomicU64>,
    random: Random,
    /// What has been asked, by cookie.
    asked: Vec<Asked>,
    free: Vec<usize>,
    outgoing: Vec<u8>,
    /// Data that belongs to the reply that is being read and isn't here yet.
    data: Data,
    latency: Histogram<u64>,
}

/// A request that is under way.
#[derive(Debug, Clone, Copy)]
struct Asked {
    /// When it was due, which with a rate may be before it was sent.
    due: Instant,
    offset: u64,
    /// How much of it hasn't been answered, in bytes.
    missing: usize,
}

/// Data of the export from `at` on, for the request with that cookie.
#[derive(Debug, Clone, Copy, Default)]
struct Data {
    cookie: usize,
    at: u64,
    length: usize,
    /// Whether it completes the request.
    is_last: bool,
}

impl Reader {
    pub(crate) fn new(
        load: &Load,
        connection: Connection,
        number: usize,
        next: Arc<AtomicU64>,
        offsets: Arc<[u64]>,
    ) -> Result<Self> {
        let seed = match load.order {
            Order::Random { seed } => seed,
            _ => 0,
        };
        Ok(Self {
            random: Random::new(seed, number),
            asked: vec![Asked { due: Instant::now(), offset: 0, missing: 0 }; load.in_flight],
            free: (0..load.in_flight).collect(),
            outgoing: Vec::new(),
            data: Data::default(),
            latency: histogram()?,
            load: load.clone(),
            connection,
            offsets,
            next,
        })
    }

    /// Reads until it is over: how long each read took, in nanoseconds.
    pub(crate) fn run(mut self) -> Result<Histogram<u64>> {
        if self.load.urgent {
            hurry()?;
        }
        let started = Instant::now();
        let pause =
            self.load.rate.map(|rate| Duration::from_secs_f64(self.load.connections as f64 / rate));
        let mut due = started;
        let mut over = false;
        loop {
            let now = Instant::now();
            while !over && !self.free.is_empty() && pause.is_none_or(|_| due <= now) {
                over = match self.load.until {
                    Until::After(time) => started.elapsed() >= time,
                    _ => false,
                } || !self.ask(if pause.is_some() { due } else { now });
                due += pause.unwrap_or_default();
            }
            if !self.outgoing.is_empty() {
                self.connection.send(&self.outgoing)?;
                self.outgoing.clear();
            }
            if self.free.len() == self.load.in_flight && over {
                break;
            }
            if pause.is_some() && !over && !self.is_readable_until(due)? {
                continue;
            }
            self.connection.receive()?;
            while self.reply()? {}
        }
        self.connection.leave();
        Ok(self.latency)
    }

    fn is_readable_until(&self, due: Instant) -> Result<bool> {
        if self.free.is_empty() {
            return Ok(true);
        }
        let left = due.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs())?,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [PollFd::new(self.connection.socket(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Makes the next request; `false` if there is none.
    fn ask(&mut self, due: Instant) -> bool {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let places = self.offsets.len() as u64;
        let place = match (self.load.order, self.load.until) {
            (_, Until::Reads(reads)) if number >= reads => return false,
            (Order::Random { .. }, _) => self.random.below(places),
            (_, Until::End) if number >= places => return false,
            _ => number % places,
        };
        let Some(cookie) = self.free.pop() else { return false };
        let offset = self.offsets[place as usize];
        self.asked[cookie] = Asked { due, offset, missing: self.load.length as usize };
        self.outgoing.extend(read_request(cookie as u64, offset, self.load.length));
        true
    }

    /// Takes a reply, or what of one is here; `false` if that is nothing.
    fn reply(&mut self) -> Result<bool> {
        if self.data.length > 0 {
            let here = self.connection.here();
            let count = self.data.length.min(here.len());
            self.compare(&here[..count])?;
            self.connection.take(count);
            self.data.at += count as u64;
            self.data.length -= count;
        } else if !(if self.connection.structured { self.chunk()? } else { self.simple()? }) {
            return Ok(false);
        }
        if self.data.length > 0 {
            return Ok(!self.connection.here().is_empty());
        }
        if std::mem::take(&mut self.data.is_last) {
            let asked = self.asked[self.data.cookie];
            ensure!(asked.missing == 0, "{} bytes of an answer are missing", asked.missing);
            self.latency.saturating_record(u64::try_from(asked.due.elapsed().as_nanos())?);
            self.free.push(self.data.cookie);
        }
        Ok(true)
    }

    /// Takes a simple reply's header, if it is here.
    fn simple(&mut self) -> Result<bool> {
        let Some(head) = self.connection.here().first_chunk() else { return Ok(false) };
        let reply = SimpleReply::decode(head).context("a reply")?;
        if reply.error != ErrorCode::OK {
            bail!("the server answers {}", reply.error);
        }
        self.connection.take(SimpleReply::SIZE);
        let asked = self.asked(reply.cookie)?;
        let (at, length) = (asked.offset, asked.missing);
        self.expect(Data { cookie: usize::try_from(reply.cookie.0)?, at, length, is_last: true })?;
        Ok(true)
    }

    /// Takes a structured reply's chunk up to its data, if all of that is here.
    fn chunk(&mut self) -> Result<bool> {
        const OFFSET: usize = 8;
        const HOLE: usize = 12;
        let here = self.connection.here();
        let Some((head, payload)) = here.split_first_chunk() else { return Ok(false) };
        let chunk = ChunkHeader::decode(head).context("a reply")?;
        let fixed = match chunk.kind {
            ReplyType::OFFSET_DATA => OFFSET,
            ReplyType::OFFSET_HOLE => HOLE,
            ReplyType::NONE => 0,
            kind => bail!("the server answers {kind}"),
        };
        let Some(payload) = payload.get(..fixed) else { return Ok(false) };
        let mut data = Data {
            cookie: usize::try_from(chunk.cookie.0)?,
            is_last: chunk.flags.contains(ReplyFlags::DONE),
            ..Data::default()
        };
        if let Some((offset, hole)) = payload.split_first_chunk() {
            data.at = u64::from_be_bytes(*offset);
            data.length = match hole.first_chunk() {
                Some(length) => u32::from_be_bytes(*length) as usize,
                None => (chunk.length as usize).checked_sub(OFFSET).context("a short chunk")?,
            };
        }
        self.connection.take(ChunkHeader::SIZE + fixed);
        self.expect(data)?;
        if chunk.kind == ReplyType::OFFSET_HOLE {
            // None of them are sent.
            let length = std::mem::take(&mut self.data.length);
            if self.load.image.is_some() {
                self.compare(&vec![0; length])?;
            }
        }
        Ok(true)
    }

    fn asked(&mut self, cookie: Cookie) -> Result<&mut Asked> {
        let cookie = usize::try_from(cookie.0)?;
        self.asked.get_mut(cookie).context("the server answers what nobody asked")
    }

    /// Notes which data comes next.
    fn expect(&mut self, data: Data) -> Result<()> {
        let asked = self.asked(Cookie(data.cookie as u64))?;
        let left = asked.missing.checked_sub(data.length);
        asked.missing = left.context("the server sends more than was asked")?;
        self.data = data;
        Ok(())
    }

    /// Compares data that came with what it should be, if that is known.
    fn compare(&self, bytes: &[u8]) -> Result<()> {
        let Some(image) = &self.load.image else { return Ok(()) };
        let mut expected = vec![0; bytes.len()];
        image.read_exact_at(&mut expected, self.data.at).context("read the image")?;
        ensure!(bytes == expected, "the server sends wrong bytes at {}", self.data.at);
        Ok(())
    }
}

/// A request to read.
pub(crate) fn read_request(cookie: u64, offset: u64, length: u32) -> [u8; Request::SIZE] {
    request(Command::READ, cookie, offset, length)
}

/// Any request.
pub(crate) fn request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let flags = CommandFlags::default();
    Request { flags, command, cookie: Cookie(cookie), offset, length: length.into() }.encode()
}
