//! Hostile archives and clients, one attack after another.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use nbd_server::client;
use nbd_server::wire::meta::MetaRequest;
use nbd_server::wire::option::{Opt, encode_option};
use nbd_server::wire::request::{Command, CommandFlags, Cookie, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::archive_writer::{self, ArchiveWriter, PASSWORD, Piece, noise, text};
use crate::reader::connect;

/// The honest archive: more than fits into the cache.
pub(crate) const HONEST: &str = "honest.hxz";
pub(crate) const HONEST_BLOCK: u64 = 65_536;
pub(crate) const HONEST_BLOCKS: u64 = 4096;

const LARGE_BLOCK: usize = 32 << 20;
/// Size of an index entry with a hash, in bytes.
const ENTRY: usize = 52;
const ENCRYPTED: usize = 30;
const LISTED: usize = 20_000;
const NAMED: usize = 1000;

/// An attack: what is served besides, and what its clients do.
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    /// Archives that are served besides the honest one.
    archives: &'static [&'static str],
    served: Served,
    pub(crate) start: fn(SocketAddr, &mut JoinSet<()>),
}

/// What else is served.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    Nothing,
    /// A folder of very many archives.
    Folder,
    /// Very many names.
    Names,
    /// Encrypted archives, whose password is another one.
    Encrypted,
}

pub(crate) const ATTACKS: &[Attack] = &[
    Attack {
        name: "tiny blocks that share a large frame",
        archives: &["frame.hxz"],
        served: Served::Nothing,
        start: |to, tasks| read_often(to, tasks, "frame.hxz", 4, 16, 65_000),
    },
    Attack {
        name: "tiny blocks",
        archives: &["tiny.hxz"],
        served: Served::Nothing,
        start: |to, tasks| read_often(to, tasks, "tiny.hxz", 4, 16, 65_000),
    },
    Attack {
        name: "block status over many pages",
        archives: &["tiny.hxz", "tiny-parent.hxz"],
        served: Served::Nothing,
        start: block_status,
    },
    Attack {
        name: "hashes that no parent has",
        archives: &["hashes.hxz"],
        served: Served::Nothing,
        start: |to, tasks| read_often(to, tasks, "hashes.hxz", 4, 64, 4096),
    },
    Attack {
        name: "slices of large blocks",
        archives: &["large.hxz"],
        served: Served::Nothing,
        start: slices,
    },
    Attack {
        name: "another archive's hashes",
        archives: &["claims.hxz"],
        served: Served::Nothing,
        start: |to, tasks| read_often(to, tasks, "claims.hxz", 4, 32, 4096),
    },
    Attack { name: "lists that nobody reads", archives: &[], served: Served::Folder, start: lists },
    Attack {
        name: "encrypted archives",
        archives: &[],
        served: Served::Encrypted,
        start: encrypted,
    },
    Attack {
        name: "queries of metadata contexts",
        archives: &[],
        served: Served::Names,
        start: queries,
    },
];

/// Archives on disk.
pub(crate) struct Material {
    folder: PathBuf,
}

impl Material {
    /// Writes all archives into `folder`.
    pub(crate) fn prepare(folder: &Path) -> Result<Self> {
        let save = |name: &str, writer: ArchiveWriter| writer.write().save(&folder.join(name));
        let main = (0..HONEST_BLOCKS).map(|seed| Piece::Data(text(seed, HONEST_BLOCK as usize)));
        save(HONEST, ArchiveWriter { main: main.collect(), ..ArchiveWriter::default() });

        let frame = zstd::bulk::compress(&vec![7; LARGE_BLOCK], 1)?;
        let frame = [frame, noise(1, LARGE_BLOCK / 2)].concat();
        save_shared(&folder.join("frame.hxz"), frame, 65_536);

        let tiny = |byte: u8| vec![Piece::Data(vec![byte]); 400_000];
        let parent = ArchiveWriter { main: tiny(1), hashed: false, ..ArchiveWriter::default() };
        save("tiny-parent.hxz", parent);
        let child = ArchiveWriter {
            main: tiny(2),
            hashed: false,
            parents: vec!["tiny-parent.hxz".into()],
            ..ArchiveWriter::default()
        };
        save("tiny.hxz", child);

        // Hashes that begin alike, in a parent, and others like them that it doesn't have.
        let alike = |number: u64| {
            let mut hash = [7; 32];
            hash[24..].copy_from_slice(&number.to_be_bytes());
            hash
        };
        let stored = zstd::bulk::compress(&[1; 512], 1)?;
        let piece =
            |number| Piece::Raw { stored: stored.clone(), length: 512, hash: alike(number) };
        let main = (0..1_000_000).map(piece).collect();
        save("hashes-parent.hxz", ArchiveWriter { main, ..ArchiveWriter::default() });
        save_references(&folder.join("hashes.hxz"), "hashes-parent.hxz", |number| {
            alike(10_000_000 + number)
        });

        let main = (0..4).map(|seed| Piece::Data(vec![seed + 1; LARGE_BLOCK])).collect();
        save("large.hxz", ArchiveWriter { main, hashed: false, ..ArchiveWriter::default() });

        // Claims the honest blocks' hashes, with frames that take long and come to something else.
        let slow = zstd::bulk::compress(&vec![9; HONEST_BLOCK as usize], 1)?;
        let claim = |seed| Piece::Raw {
            stored: slow.clone(),
            length: HONEST_BLOCK as u32,
            hash: *blake3::hash(&text(seed, HONEST_BLOCK as usize)).as_bytes(),
        };
        let main = (0..HONEST_BLOCKS).map(claim).collect();
        save("claims.hxz", ArchiveWriter { main, ..ArchiveWriter::default() });

        let small = ArchiveWriter::of_image(&text(1, 512), 512).write();
        small.save(&folder.join("small.hxz"));
        let listed = folder.join("listed");
        fs::create_dir(&listed)?;
        for number in 0..LISTED {
            fs::hard_link(
                folder.join("small.hxz"),
                listed.join(format!("a-rather-long-name-of-an-archive-{number}.hxz")),
            )?;
        }
        for number in 0..ENCRYPTED {
            let writer = ArchiveWriter {
                password: Some(PASSWORD),
                iterations: 1_000_000,
                ..ArchiveWriter::of_image(&text(1, 512), 512)
            };
            save(&encrypted_name(number), writer);
        }
        Ok(Self { folder: folder.to_owned() })
    }

    /// Options of the program for an attack.
    pub(crate) fn arguments(&self, attack: &Attack) -> Vec<String> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let archives = [HONEST].into_iter().chain(attack.archives.iter().copied());
        let mut arguments: Vec<String> = archives.map(path).collect();
        match attack.served {
            Served::Nothing => {}
            Served::Folder => arguments.extend(["--export-dir".into(), path("listed")]),
            Served::Names => {
                let small = path("small.hxz");
                arguments.extend((0..NAMED).map(|number| format!("name-{number}={small}")));
            }
            Served::Encrypted => {
                // Found when they are asked for, so that the program starts.
                arguments.extend(["--export-dir".into(), self.folder.display().to_string()]);
            }
        }
        arguments
    }
}

fn encrypted_name(number: usize) -> String {
    format!("encrypted-{number}.hxz")
}

/// An archive of so many blocks of one byte that share one stored frame.
fn save_shared(path: &Path, stored: Vec<u8>, blocks: usize) {
    let first = Piece::Raw { stored, length: 1, hash: [0; 32] };
    let main = std::iter::once(first).chain(vec![Piece::Zeros(1); blocks - 1]).collect();
    let mut written = ArchiveWriter { main, ..ArchiveWriter::default() }.write();
    let entries: Vec<usize> =
        written.main.iter().flat_map(|page| &page.blocks).map(|block| block.entry).collect();
    let shared = written.bytes[entries[0]..entries[0] + ENTRY].to_vec();
    for entry in entries {
        written.put(entry, &shared);
    }
    written.save(path);
}

/// An archive of references by hash to blocks that its parent doesn't have.
fn save_references(path: &Path, parent: &str, hash: impl Fn(u64) -> [u8; 32]) {
    let mut written = ArchiveWriter {
        main: vec![Piece::InParent(vec![1; 512]); 100_000],
        parents: vec![parent.to_owned()],
        ..ArchiveWriter::default()
    }
    .write();
    let blocks: Vec<usize> =
        written.main.iter().flat_map(|page| &page.blocks).map(|block| block.entry).collect();
    for (number, entry) in (0..).zip(blocks) {
        written.put(entry + archive_writer::block_entry::HASH, &hash(number));
    }
    written.save(path);
}

/// An attacker's address, one for each client.
fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 3, 0, 1 + number)
}

/// Clients that do the same again and again, each on a connection of its own.
fn spawn<F>(tasks: &mut JoinSet<()>, clients: u8, attack: impl Fn(u8) -> F + Clone + Send + 'static)
where
    F: Future<Output = Result<()>> + Send,
{
    for number in 0..clients {
        let attack = attack.clone();
        tasks.spawn(async move {
            loop {
                // It is refused, or closed: it comes back.
                if attack(number).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        });
    }
}

fn request(command: Command, number: u64, offset: u64, length: u32) -> [u8; Request::SIZE] {
    let flags = CommandFlags::default();
    Request { flags, command, cookie: Cookie(number), offset, length: length.into() }.encode()
}

/// Chooses an export, and returns its size.
async fn choose(to: SocketAddr, from: Ipv4Addr, name: &str) -> Result<(TcpStream, u64)> {
    let mut stream = connect(from, to).await?;
    client::negotiate_structured_replies(&mut stream).await?;
    let size = client::info(&mut stream, name).await?.size;
    stream.write_all(&encode_option(Opt::GO, &go(name))).await?;
    Ok((stream, size))
}

/// Data of GO, without information requests.
fn go(name: &str) -> Vec<u8> {
    let length = u32::try_from(name.len()).unwrap_or_default();
    [&length.to_be_bytes(), name.as_bytes(), &[0; 2]].concat()
}

/// Clients with so many reads of that length in flight, all over an export.
fn read_often(
    to: SocketAddr,
    tasks: &mut JoinSet<()>,
    name: &'static str,
    clients: u8,
    in_flight: u64,
    length: u32,
) {
    spawn(tasks, clients, move |number| async move {
        let (mut stream, size) = choose(to, address(number), name).await?;
        let length = u64::from(length).min(size);
        let mut next = u64::from(number) * 7919;
        for _ in 0..100 {
            let mut requests = Vec::new();
            for _ in 0..in_flight {
                next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let offset = (next >> 16) % (size - length + 1);
                let length = u32::try_from(length).unwrap_or_default();
                requests.extend(request(Command::READ, next, offset, length));
            }
            stream.write_all(&requests).await?;
            read_for(&mut stream, Duration::from_millis(50)).await?;
        }
        Ok(())
    });
}

/// Reads whatever comes, for that long.
async fn read_for(stream: &mut TcpStream, duration: Duration) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let read = async {
        while stream.read(&mut buffer).await? > 0 {}
        anyhow::bail!("it was closed")
    };
    tokio::time::timeout(duration, read).await.unwrap_or(Ok(()))
}

/// Block status of all of an archive, compared with its parent, on one connection.
fn block_status(to: SocketAddr, tasks: &mut JoinSet<()>) {
    spawn(tasks, 1, move |number| async move {
        let mut stream = connect(address(number), to).await?;
        client::negotiate_structured_replies(&mut stream).await?;
        let contexts = ["base:allocation", "hexz:changed:tiny-parent.hxz"];
        client::select_contexts(&mut stream, "tiny.hxz", &contexts).await?;
        stream.write_all(&encode_option(Opt::GO, &go("tiny.hxz"))).await?;
        for _ in 0..1000 {
            let requests: Vec<u8> = (0..64)
                .flat_map(|number| request(Command::BLOCK_STATUS, number, 0, 400_000))
                .collect();
            stream.write_all(&requests).await?;
            read_for(&mut stream, Duration::from_millis(20)).await?;
        }
        Ok(())
    });
}

/// Reads across the border of two large blocks, whose replies nobody reads.
fn slices(to: SocketAddr, tasks: &mut JoinSet<()>) {
    spawn(tasks, 16, move |number| async move {
        let (mut stream, _) = choose(to, address(number), "large.hxz").await?;
        let border = LARGE_BLOCK as u64;
        let requests: Vec<u8> = (0..4)
            .flat_map(|number| {
                request(Command::READ, number, border * (1 + number % 3) - 512, 1024)
            })
            .collect();
        stream.write_all(&requests).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(())
    });
}

/// Clients that ask for the list of all exports, and read nothing of it.
fn lists(to: SocketAddr, tasks: &mut JoinSet<()>) {
    spawn(tasks, 30, move |number| async move {
        let mut stream = connect(address(number), to).await?;
        stream.write_all(&encode_option(Opt::LIST, &[])).await?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        Ok(())
    });
}

/// Clients that each choose an encrypted archive.
fn encrypted(to: SocketAddr, tasks: &mut JoinSet<()>) {
    spawn(tasks, 30, move |number| async move {
        let mut stream = connect(address(number), to).await?;
        client::info(&mut stream, &encrypted_name(number.into())).await?;
        Ok(())
    });
}

/// Clients with as many queries as fit into an option.
fn queries(to: SocketAddr, tasks: &mut JoinSet<()>) {
    spawn(tasks, 8, move |number| async move {
        let mut stream = connect(address(number), to).await?;
        client::negotiate_structured_replies(&mut stream).await?;
        let queries: Vec<String> =
            (0..1000).map(|number| format!("hexz:changed:name-{number:036}")).collect();
        let queries = queries.iter().map(String::as_bytes).collect();
        let request = MetaRequest { name: b"name-0", queries }.encode();
        for _ in 0..100 {
            stream.write_all(&encode_option(Opt::SET_META_CONTEXT, &request)).await?;
            read_for(&mut stream, Duration::from_millis(10)).await?;
        }
        Ok(())
    });
}
