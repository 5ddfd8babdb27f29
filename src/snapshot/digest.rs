//! Digests that archives have to have: lists of BLAKE3, as `b3sum` writes them.
//!
//! A digest covers every byte of an archive, unlike a signature. It has to be compared when
//! the archive is opened, which means to read all of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytesize::ByteSize;

use super::error::{Error, Problem, printable};
use crate::storage::{self, FileStamp, Storage};

/// Hashing a smaller file takes no time worth a line in the log, in bytes.
const BIG: u64 = 1 << 30;

/// A BLAKE3-256 of a whole file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Hashes all of `storage` on all cores, in bounded memory.
    ///
    /// # Errors
    /// It can't be read.
    pub fn of(storage: &dyn Storage) -> io::Result<Self> {
        storage::blake3(storage, &|_, _| true).map(Self)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The digests that archives have to have, by file name.
#[derive(Debug, Default)]
pub struct Digests {
    pins: HashMap<OsString, Pin>,
}

/// One archive's digest.
#[derive(Debug)]
struct Pin {
    expected: Digest,
    /// What was hashed last under this name. A parent of many archives isn't read whole for
    /// each of them, and one that is wrong not each time that somebody asks for it.
    known: Mutex<Option<(FileStamp, Digest)>>,
}

/// What is wrong with a list of digests.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestsError {
    /// Not what b3sum writes.
    #[error(
        "line {0} is not a BLAKE3 of 64 hexadecimal digits, two spaces and a path, as \
         \"hexz-nbd digest\" and b3sum write it"
    )]
    Line(usize),
    /// Not `NAME=BLAKE3`.
    #[error("it is not NAME=BLAKE3, with a file's name and 64 hexadecimal digits")]
    Pin,
    /// Two files of one name.
    #[error(
        "there are two digests for {}; archives are told apart by their file names, without \
         folders: give one of them another name", printable(Path::new(.0))
    )]
    Twice(OsString),
    /// Nothing in it.
    #[error("there is no digest in it")]
    Empty,
}

impl Digests {
    /// Adds the lines of a list: `BLAKE3  PATH`, of which the last part of PATH counts.
    ///
    /// # Errors
    /// See [`DigestsError`].
    pub fn add_list(&mut self, list: &[u8]) -> Result<(), DigestsError> {
        let mut is_empty = true;
        for (number, line) in (1..).zip(list.split(|&byte| byte == b'\n')) {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() {
                continue;
            }
            let (digest, name) = parse_line(line).ok_or(DigestsError::Line(number))?;
            self.add(&name, digest)?;
            is_empty = false;
        }
        if is_empty { Err(DigestsError::Empty) } else { Ok(()) }
    }

    /// Adds one digest, as `NAME=BLAKE3`.
    ///
    /// # Errors
    /// See [`DigestsError`].
    pub fn add_pin(&mut self, pin: &OsStr) -> Result<(), DigestsError> {
        let (name, digest) = split_pin(pin).ok_or(DigestsError::Pin)?;
        self.add(name, digest)
    }

    /// Whether a text has the form of `NAME=BLAKE3`, so that it isn't the path of a list.
    pub fn is_pin(text: &OsStr) -> bool {
        split_pin(text).is_some()
    }

    fn add(&mut self, name: &OsStr, expected: Digest) -> Result<(), DigestsError> {
        match self.pins.entry(name.to_owned()) {
            Entry::Occupied(pin) if pin.get().expected == expected => Ok(()),
            Entry::Occupied(pin) => Err(DigestsError::Twice(pin.key().clone())),
            Entry::Vacant(place) => {
                place.insert(Pin { expected, known: Mutex::default() });
                Ok(())
            }
        }
    }

    /// Takes over what another list's archives were hashed to, so that those that haven't
    /// changed needn't be read again.
    pub fn remember(&self, before: &Self) {
        for (name, pin) in &self.pins {
            // One that is being hashed just now will be hashed again.
            if let Some(before) = before.pins.get(name)
                && let (Ok(mut known), Ok(before)) = (pin.known.lock(), before.known.try_lock())
            {
                *known = *before;
            }
        }
    }

    /// Refuses an archive that is in no list, before a byte of it is read.
    pub(super) fn expect(&self, path: &Arc<Path>) -> Result<(), Error> {
        self.pin(path).map(|_| ())
    }

    /// Compares the whole of an archive with its digest.
    ///
    /// `parts` are what was read of it before, with their offsets: they are compared with
    /// what is hashed, so that nothing is used that the digest doesn't vouch for.
    pub(super) fn check(
        &self,
        path: &Arc<Path>,
        storage: &dyn Storage,
        parts: &[(u64, &[u8])],
    ) -> Result<(), Error> {
        let pin = self.pin(path)?;
        // Who needs the same file waits; all others don't.
        let mut known = pin.known.lock().unwrap_or_else(PoisonError::into_inner);
        let got = match (*known, storage.stamp()) {
            (Some((stamp, digest)), Some(now)) if stamp == now => digest,
            (_, stamp) => {
                let digest = hash(path, storage, parts)?;
                *known = stamp.map(|stamp| (stamp, digest));
                digest
            }
        };
        drop(known);
        if !storage.is_unchanged() {
            return Err(Problem::Changed.of(path));
        }
        if got == pin.expected {
            Ok(())
        } else {
            Err(Problem::Digest { got, expected: pin.expected }.of(path))
        }
    }

    fn pin(&self, path: &Arc<Path>) -> Result<&Pin, Error> {
        path.file_name()
            .and_then(|name| self.pins.get(name))
            .ok_or_else(|| Problem::NoDigest.of(path))
    }
}

fn hash(path: &Arc<Path>, storage: &dyn Storage, parts: &[(u64, &[u8])]) -> Result<Digest, Error> {
    let length = storage.length();
    let size = ByteSize::b(length).display().iec();
    if length >= BIG {
        tracing::info!("{}: comparing all of its {size} with its digest", printable(path));
    }
    let start = Instant::now();
    let is_same = |at, piece: &[u8]| {
        parts.iter().all(|&(from, part)| {
            let (piece, part) = overlap((at, piece), (from, part));
            piece == part
        })
    };
    let digest = storage::blake3(storage, &is_same).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => Problem::Changed.of(path),
        _ => Problem::Io("read all of it for its digest", error).of(path),
    })?;
    if length >= BIG {
        let seconds = start.elapsed().as_secs().max(1);
        let rate = ByteSize::b(length / seconds).display().iec();
        tracing::info!("{}: hashed {size} in {seconds} s, {rate}/s", printable(path));
    }
    Ok(Digest(digest))
}

/// What two pieces, each with its offset, both have of the file: as the one has it, and as
/// the other does.
fn overlap<'a>(a: (u64, &'a [u8]), b: (u64, &'a [u8])) -> (&'a [u8], &'a [u8]) {
    let end = |(start, bytes): (u64, &[u8])| start.saturating_add(bytes.len() as u64);
    let (from, to) = (a.0.max(b.0), end(a).min(end(b)));
    let part = |(start, bytes): (u64, &'a [u8])| {
        let from = usize::try_from(from.checked_sub(start)?).ok()?;
        let to = usize::try_from(to.checked_sub(start)?).ok()?;
        bytes.get(from..to)
    };
    (part(a).unwrap_or_default(), part(b).unwrap_or_default())
}

/// A line of a list, without its end.
pub fn format_line(digest: Digest, path: &Path) -> Vec<u8> {
    let mut line = Vec::new();
    let path = path.as_os_str().as_bytes();
    let is_odd = path.iter().any(|byte| b"\\\n\r".contains(byte));
    if is_odd {
        line.push(b'\\');
    }
    line.extend(format!("{digest}  ").as_bytes());
    for &byte in path {
        match byte {
            b'\\' => line.extend(br"\\"),
            b'\n' => line.extend(br"\n"),
            b'\r' => line.extend(br"\r"),
            byte => line.push(byte),
        }
    }
    line
}

/// The digest and the file name of a line. A backslash in front of it says that the path has
/// some, too: for line breaks, and for themselves.
fn parse_line(line: &[u8]) -> Option<(Digest, OsString)> {
    let (line, is_escaped) = match line.strip_prefix(b"\\") {
        Some(line) => (line, true),
        None => (line, false),
    };
    let (digest, path) = line.split_at_checked(64)?;
    let digest = digest_of(digest)?;
    // A star is of those who tell binary files from text.
    let path = path.strip_prefix(b"  ").or_else(|| path.strip_prefix(b" *"))?;
    let path = if is_escaped { unescape(path)? } else { path.to_vec() };
    let name = Path::new(&OsString::from_vec(path)).file_name()?.to_owned();
    Some((digest, name))
}

fn unescape(path: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::with_capacity(path.len());
    let mut bytes = path.iter();
    while let Some(&byte) = bytes.next() {
        plain.push(match (byte, byte == b'\\') {
            (byte, false) => byte,
            (_, true) => match bytes.next()? {
                b'n' => b'\n',
                b'r' => b'\r',
                b'\\' => b'\\',
                _ => return None,
            },
        });
    }
    Some(plain)
}

fn split_pin(pin: &OsStr) -> Option<(&OsStr, Digest)> {
    let (rest, digest) = pin.as_bytes().split_last_chunk::<64>()?;
    let name = OsStr::from_bytes(rest.strip_suffix(b"=")?);
    // The name of a file, and no path to it.
    let is_name = Path::new(name).file_name() == Some(name);
    is_name.then_some((name, digest_of(digest)?))
}

fn digest_of(hex: &[u8]) -> Option<Digest> {
    blake3::Hash::from_hex(hex).ok().map(|hash| Digest(*hash.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "3ebfc4fd8c2484be73524c218d5260fc92dcb080dee526a6be43df65755391da";

    fn digests(list: &str) -> Result<Digests, DigestsError> {
        let mut digests = Digests::default();
        digests.add_list(list.as_bytes()).map(|()| digests)
    }

    fn knows(digests: &Digests, path: &str) -> bool {
        digests.expect(&Arc::from(Path::new(path))).is_ok()
    }

    #[test]
    fn archives_are_told_by_their_file_name() {
        let list = format!("{HEX}  a/b.hxz\r\n\n{}  with  two.hxz\n{HEX} *c", HEX.to_uppercase());
        let digests = digests(&list).unwrap();
        for path in ["b.hxz", "/x/b.hxz", "with  two.hxz", "c"] {
            assert!(knows(&digests, path), "{path}");
        }
        for path in ["a", "B.hxz", "b.hxz.old", "two.hxz", "b.hxz/..", ""] {
            assert!(!knows(&digests, path), "{path}");
        }
    }

    #[test]
    fn what_is_no_list() {
        for (list, number) in [
            (HEX.to_owned(), 1),
            (format!("{HEX}  a\n{HEX} b"), 2),
            (format!("{HEX}  "), 1),
            (format!("{HEX}  .."), 1),
            (format!("  {HEX}  a"), 1),
            (format!("{}  a", &HEX[1..]), 1),
            (format!("BLAKE3 (a) = {HEX}"), 1),
            (format!("\\{HEX}  a\\b"), 1),
            (format!("\u{e9}{HEX}  a"), 1),
        ] {
            assert_eq!(digests(&list).unwrap_err(), DigestsError::Line(number), "{list}");
        }
        assert_eq!(digests("\n\n").unwrap_err(), DigestsError::Empty);
    }

    #[test]
    fn one_name_has_one_digest() {
        assert!(digests(&format!("{HEX}  a/x\n{HEX}  b/x")).is_ok());
        let other = HEX.replace('3', "4");
        let twice = digests(&format!("{HEX}  a/x\n{other}  b/x"));
        assert_eq!(twice.unwrap_err(), DigestsError::Twice("x".into()));
    }

    #[test]
    fn a_single_digest() {
        let mut digests = Digests::default();
        for good in [format!("a.hxz={HEX}"), format!("b=c={HEX}")] {
            assert!(Digests::is_pin(good.as_ref()));
            digests.add_pin(good.as_ref()).unwrap();
        }
        assert!(knows(&digests, "x/a.hxz") && knows(&digests, "b=c"));
        for bad in [HEX.to_owned(), format!("={HEX}"), format!("a/b={HEX}"), format!("a={HEX}0")] {
            assert!(!Digests::is_pin(bad.as_ref()), "{bad}");
            assert_eq!(digests.add_pin(bad.as_ref()), Err(DigestsError::Pin));
        }
    }

    #[test]
    fn lines_are_read_as_they_are_written() {
        let digest = digest_of(HEX.as_bytes()).unwrap();
        for name in ["plain.hxz", "a b", "line\nbreak", "back\\slash", "\\n", "cr\r"] {
            let line = format_line(digest, &Path::new("folder").join(name));
            assert_eq!(parse_line(&line), Some((digest, name.into())), "{name:?}");
            assert!(!line.contains(&b'\n'));
        }
        let plain = format_line(digest, Path::new("a.hxz"));
        assert_eq!(plain, format!("{HEX}  a.hxz").into_bytes());
    }

    #[test]
    fn what_two_pieces_share() {
        let both = |a, b| overlap((10, b"0123456789"), (a, b));
        assert_eq!(both(12, b"xy"), (&b"23"[..], &b"xy"[..]));
        assert_eq!(both(8, b"abcd"), (&b"01"[..], &b"cd"[..]));
        assert_eq!(both(18, b"abcd"), (&b"89"[..], &b"ab"[..]));
        for (at, piece) in [(0, &b"abc"[..]), (7, b"abc"), (20, b"abc"), (15, b"")] {
            assert_eq!(both(at, piece), (&b""[..], &b""[..]), "{at}");
        }
    }
}
