//! Clients that choose no export and cost much, or ask about exports that are not theirs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::BASE;
use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, noise, text};
use crate::support::archive;
use crate::support::client::{
    Client, OPT_GO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, REP_ACK,
    REP_ERR_TOO_BIG, REP_SERVER, Session, ack, info_data, meta_data, option,
};
use crate::support::server::{Builder, Server};
use crate::support::structured::{Mode, Question};

const CHILD: &str = "child-zstd.hxz";
const ALLOCATION: &str = "base:allocation";

/// Rules that let anybody open these exports and no others.
fn allowing(folder: &TempDir, exports: &[&str]) -> PathBuf {
    let path = folder.path().join("rules.toml");
    let rule = |export: &&str| format!("[[rule]]\naction = \"allow\"\nexport = \"{export}\"\n");
    fs::write(&path, exports.iter().map(rule).collect::<String>()).unwrap();
    path
}

fn by_rules(builder: Builder, folder: &TempDir, exports: &[&str]) -> Server {
    builder.args(["--raw", "--insecure-no-tls", "--rules"]).arg(allowing(folder, exports)).start()
}

fn structured(server: &Server) -> Client<Session> {
    let mut client = server.greeted();
    Mode::Structured.negotiate(&mut client);
    client
}

/// Names that an export can be compared with, as LIST says, after SET has said the same to
/// whoever asks for `names`.
fn compared(server: &Server, export: &str, names: &[&str]) -> Vec<String> {
    let mut client = structured(server);
    let name = |context: String| context.strip_prefix("hexz:changed:").map(str::to_owned);
    let listed: Vec<String> =
        client.list_contexts(export, &["hexz:"]).into_iter().filter_map(name).collect();
    // Whatever the query is like.
    assert_eq!(client.list_contexts(export, &["qemu:dirty-bitmap:"]).len(), listed.len());
    assert_eq!(client.list_contexts(export, &[]).len(), 1 + 2 * listed.len());
    for name in names {
        for context in [format!("hexz:changed:{name}"), format!("qemu:dirty-bitmap:{name}")] {
            let expected: &[&str] =
                if listed.iter().any(|it| it == name) { &[&context] } else { &[] };
            assert_eq!(client.list_contexts(export, &[&context]), expected, "{export}: {context}");
            let set = client.set_contexts(export, &[&context]);
            let set: Vec<&str> = set.iter().map(|(_, name)| name.as_str()).collect();
            assert_eq!(set, expected, "{export}: {context}");
        }
    }
    listed
}

/// Two archives that have an auxiliary stream each.
fn two_with_auxiliary_streams() -> (TempDir, [PathBuf; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["newer.hxz", "older.hxz"].map(|name| folder.path().join(name));
    for (seed, path) in (0..).zip(&paths) {
        let piece = |seed| vec![Piece::Data(noise(seed, 4096))];
        let archive =
            ArchiveWriter { main: piece(seed), auxiliary: piece(seed + 7), ..Default::default() };
        archive.write().save(path);
    }
    (folder, paths)
}

/// The auxiliary streams were compared for whoever may open the other's main stream.
#[test]
fn a_stream_is_compared_with_by_who_may_open_that_stream() {
    let (folder, paths) = two_with_auxiliary_streams();
    for (allowed, main, auxiliary) in [
        (&["newer.hxz*", "older.hxz*"][..], true, true),
        (&["newer.hxz*", "older.hxz"], true, false),
        (&["newer.hxz*", "older.hxz/aux"], false, true),
        (&["newer.hxz*"], false, false),
        (&["*/aux", "newer.hxz"], false, true),
    ] {
        let server = by_rules(Server::builder().args(&paths), &folder, allowed);
        for (export, may) in [("newer.hxz", main), ("newer.hxz/aux", auxiliary)] {
            let expected: &[&str] = if may { &["older.hxz"] } else { &[] };
            let found = compared(&server, export, &["older.hxz", "older.hxz/aux"]);
            assert_eq!(found, expected, "{export} {allowed:?}");
        }
    }
}

/// A parent's file name isn't always the name that it is served under, and denied by.
#[test]
fn a_parent_is_compared_with_by_who_may_open_it_under_all_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let exports = path("exports");
    fs::create_dir(&exports).unwrap();
    for name in [BASE, CHILD] {
        fs::copy(archive(name), exports.join(name)).unwrap();
    }
    let base = exports.join(BASE);
    fs::hard_link(&base, path("linked.hxz")).unwrap();
    symlink(&base, path("symlink.hxz")).unwrap();
    symlink(&exports, path("elsewhere")).unwrap();
    let served_as = |secret: &Path| {
        Server::builder()
            .arg(format!("child={}", exports.join(CHILD).display()))
            .arg(format!("secret={}", secret.display()))
    };
    let names = ["secret", BASE];
    for secret in [
        base.clone(),
        path("linked.hxz"),
        path("symlink.hxz"),
        path("elsewhere").join(BASE),
        exports.join(".").join(BASE),
    ] {
        let server = by_rules(served_as(&secret), &folder, &["child", BASE]);
        assert_eq!(compared(&server, "child", &names), [""; 0], "{}", secret.display());
        let server = by_rules(served_as(&secret), &folder, &["child", "secret"]);
        assert_eq!(compared(&server, "child", &names), ["secret"]);
        let server = by_rules(served_as(&secret), &folder, &["child", BASE, "secret"]);
        assert_eq!(compared(&server, "child", &names), ["secret", BASE]);
    }
    // It is another file with the same content, so nothing is known of the first one's.
    fs::copy(&base, path("copy.hxz")).unwrap();
    let server = by_rules(served_as(&path("copy.hxz")), &folder, &["child", BASE]);
    assert_eq!(compared(&server, "child", &names), [BASE]);
}

/// The same where names are those of files, and where a name of the folder is hidden.
#[test]
fn links_in_the_folder_are_names_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let exports = folder.path().join("exports");
    fs::create_dir(&exports).unwrap();
    for name in [BASE, CHILD] {
        fs::copy(archive(name), exports.join(name)).unwrap();
    }
    let serving = || Server::builder().arg("--export-dir").arg(&exports);
    let names = [BASE, "secret.hxz"];
    let server = by_rules(serving(), &folder, &[CHILD, BASE]);
    assert_eq!(compared(&server, CHILD, &names), [BASE]);
    // From the moment on at which it has another name.
    fs::hard_link(exports.join(BASE), exports.join("secret.hxz")).unwrap();
    assert_eq!(compared(&server, CHILD, &names), [""; 0]);
    fs::remove_file(exports.join("secret.hxz")).unwrap();
    assert_eq!(compared(&server, CHILD, &names), [BASE]);
    // One that isn't a client's to ask for is nobody's name.
    symlink(exports.join(BASE), exports.join("secret.hxz")).unwrap();
    assert_eq!(compared(&server, CHILD, &names), [BASE]);
    let server = by_rules(
        serving().arg(format!("secret={}", exports.join(BASE).display())),
        &folder,
        &[CHILD, BASE],
    );
    assert_eq!(compared(&server, CHILD, &["secret", BASE]), [""; 0]);
}

/// An archive that is named twice has two names, too.
#[test]
fn a_named_archive_is_compared_with_by_who_may_open_it_under_all_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str, file: &str| format!("{name}={}", archive(file).display());
    let served = || {
        let served = [named("a", BASE), named("b", BASE), named("c", "sparse-zstd.hxz")];
        Server::builder().args(served)
    };
    let server = by_rules(served(), &folder, &["a", "c"]);
    assert_eq!(compared(&server, "c", &["a", "b"]), [""; 0]);
    assert_eq!(compared(&server, "a", &["b", "c"]), ["c"]);
    let server = by_rules(served(), &folder, &["a", "b", "c"]);
    assert_eq!(compared(&server, "c", &["a", "b"]), ["a", "b"]);
}

/// What a client may not open any more it can't ask about any more either.
#[test]
fn who_compares_with_what_is_denied_since_a_reload_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let served = || Server::builder().archive(BASE).archive(CHILD);
    let server = by_rules(served(), &folder, &["*"]);
    let reading = |context: &str| {
        let mut client = structured(&server);
        assert_eq!(client.set_contexts(CHILD, &[context]).len(), 1);
        client.go(CHILD);
        let question = Question::status(0, 4096);
        client.send(&question.encode(Mode::Structured));
        let outcomes = client.outcomes_in(Mode::Structured, &[question]);
        assert_eq!(outcomes[&question.cookie].number(), 0);
        client
    };
    let mut compares = reading(&format!("hexz:changed:{BASE}"));
    let mut reads = reading(ALLOCATION);
    allowing(&folder, &[CHILD]);
    server.signal("HUP");
    server.wait_for_reloads(1);
    compares.expect_closed();
    let question = Question::status(0, 4096);
    reads.send(&question.encode(Mode::Structured));
    let outcomes = reads.outcomes_in(Mode::Structured, &[question]);
    assert_eq!(outcomes[&question.cookie].number(), 0);
}

/// Archives with the same content.
fn many(folder: &Path, count: usize) -> Vec<PathBuf> {
    let archive = ArchiveWriter::of_image(&text(1, 4096), 4096).write();
    let save = |number: usize| {
        let path = folder.join(format!("{number:04}.hxz"));
        archive.save(&path);
        path
    };
    (0..count).map(save).collect()
}

/// As many queries as fit into one option, of which `different` are different.
fn queries(different: usize) -> Vec<u8> {
    let queries: Vec<String> = (0..different).map(|number| format!("x:{number:04}")).collect();
    let all: Vec<&[u8]> =
        queries.iter().map(|query| query.as_bytes()).cycle().take((65_536 - 12) / 10).collect();
    let data = meta_data(b"0001", &all);
    assert!((65_000..=65_536).contains(&data.len()));
    data
}

/// Every query was compared with every context of every export, on the threads that serve: 64 KiB
/// of queries against 1000 exports took 0.3 s of an optimized build, in which nobody else was
/// served.
#[test]
fn many_queries_against_many_exports_cost_little_and_only_on_the_threads_of_handshakes() {
    // Each of them is open.
    const EXPORTS: usize = 800;
    let folder = tempfile::tempdir().unwrap();
    let paths = many(folder.path(), EXPORTS);
    let name = |(number, path): (usize, &PathBuf)| format!("{number:04}={}", path.display());
    let server = Server::builder().args(paths.iter().enumerate().map(name)).start();
    let mut client = structured(&server);
    let data = queries(1000);
    let before = server.cpu_time();
    for _ in 0..5 {
        for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
            assert_eq!(client.option(number, &data), [ack()]);
        }
    }
    let used = server.cpu_time() - before;
    // Comparing each with each took more than ten times as much of a debug build.
    assert!(used < std::time::Duration::from_secs(2), "{used:?}");

    // A wildcard costs something, and so shows where.
    let before = server.cpu_by_thread();
    let spent = |of_handshakes: bool| -> u64 {
        let now = server.cpu_by_thread().into_iter();
        let now = now.filter(|(_, (name, _))| (name == "handshakes") == of_handshakes);
        now.map(|(id, (_, ticks))| ticks - before.get(&id).map_or(0, |(_, ticks)| *ticks)).sum()
    };
    let mut rounds = 0;
    while spent(true) < 40 {
        let contexts = client.list_contexts("0001", &["hexz:", "qemu:dirty-bitmap:"]);
        assert_eq!(contexts.len(), 2 * (EXPORTS - 1));
        rounds += 1;
        assert!(rounds < 2000, "{} ticks", spent(true));
    }
    assert!(spent(false) < 20, "{} ticks on other threads", spent(false));

    let too_many = queries(1025);
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        client.refused(number, &too_many, REP_ERR_TOO_BIG);
    }
    // What a client selects is kept, so it is bounded; what it selected before is forgotten.
    let contexts: Vec<String> = (2..67).map(|number| format!("hexz:changed:{number:04}")).collect();
    let contexts: Vec<&[u8]> = contexts.iter().map(|context| context.as_bytes()).collect();
    client.refused(OPT_SET_META_CONTEXT, &meta_data(b"0001", &contexts), REP_ERR_TOO_BIG);
    let replies = client.option(OPT_SET_META_CONTEXT, &meta_data(b"0001", &contexts[1..]));
    assert_eq!(replies.len(), 64 + 1);
    client.option(OPT_GO, &info_data(b"0001", &[]));
    client.send(&Question::status(0, 4096).encode(Mode::Structured));
}

/// Each client that asked for LIST and read nothing held the whole answer.
#[test]
fn clients_that_read_no_list_hold_next_to_nothing() {
    const CLIENTS: u8 = 30;
    const EXPORTS: usize = 6000;
    const GROWTH_KIB: u64 = 16 * 1024;
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("first.hxz");
    ArchiveWriter::of_image(&text(1, 4096), 4096).write().save(&first);
    for number in 0..EXPORTS {
        // As long as the name of a file can be.
        let name = format!("{number:0251}.hxz");
        fs::hard_link(&first, folder.path().join(name)).unwrap();
    }
    let server = Server::builder().arg("--export-dir").arg(folder.path()).start();
    assert_eq!(server.greeted().list().len(), EXPORTS + 1);
    let before = server.rss_kib();
    let mut clients: Vec<Client<Session>> = (0..CLIENTS).map(|_| server.greeted()).collect();
    for client in &mut clients {
        client.send(&option(OPT_LIST, b""));
    }
    // Whoever is sent something has all that it will hold.
    let heads: Vec<(u32, usize)> = clients.iter_mut().map(reply_head).collect();
    let growth = server.rss_kib().saturating_sub(before);
    assert!(growth < GROWTH_KIB, "{growth} KiB");
    // They get all of it nevertheless when they read on.
    for (mut client, mut head) in clients.into_iter().zip(heads).take(3) {
        let mut replies = 0;
        while head.0 == REP_SERVER {
            client.receive(head.1);
            replies += 1;
            head = reply_head(&mut client);
        }
        assert_eq!((head, replies), ((REP_ACK, 0), EXPORTS + 1));
    }
}

/// The head of the next reply: its kind, and the length of what follows.
fn reply_head(client: &mut Client<Session>) -> (u32, usize) {
    let head = client.receive(20);
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    (number(12), number(16) as usize)
}

/// A list opened all archives one after another, and so derived the key of each: with these
/// archives, that takes hours.
#[test]
fn a_list_derives_no_keys() {
    const ARCHIVES: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let archive = ArchiveWriter {
        password: Some(PASSWORD),
        main: vec![Piece::Data(text(5, 1000))],
        auxiliary: vec![Piece::Data(text(6, 1000))],
        ..ArchiveWriter::default()
    };
    let mut archive = archive.write();
    archive.set("iterations", &10_000_000_u32.to_le_bytes());
    for number in 0..ARCHIVES {
        // Each is a file of its own.
        archive.save(&folder.path().join(format!("{number:03}.hxz")));
    }
    let serving = || Server::builder().arg("--export-dir").arg(folder.path());
    let server = serving().env("HEXZ_PASSWORD", PASSWORD).start();
    let names = server.greeted().list();
    for number in 0..ARCHIVES {
        assert!(names.contains(&format!("{number:03}.hxz")), "{number}");
    }
    // Without a password, none can be served.
    assert_eq!(serving().start().greeted().list(), [""; 0]);
}
