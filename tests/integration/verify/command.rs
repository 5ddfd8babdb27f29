//! `hexz-nbd verify` and `hexz-nbd digest`, as they are run.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::archive_writer::{ArchiveWriter, Piece, text};
use crate::support::server::{Ended, Server, run};
use crate::support::{PASSWORD, archive, wait_until};

fn verify<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Ended {
    run(std::iter::once("verify".into()).chain(args.into_iter().map(Into::into)))
}

fn objects(ended: &Ended) -> Vec<Value> {
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn sound_archives() {
    let names = ["base-zstd.hxz", "grandchild-zstd.hxz", "aux-lz4.hxz", "tree.hxz"];
    let args = ["--raw".into(), "--json".into()].into_iter().chain(names.map(archive));
    let ended = verify(args);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let objects = objects(&ended);
    assert_eq!(objects.len(), 4, "{}", ended.stdout);
    assert!(objects.iter().all(|it| it["is_sound"] == true), "{}", ended.stdout);
}

#[test]
fn archives_that_cannot_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let [password, wrong] = ["right", "wrong"].map(|name| folder.path().join(name));
    fs::write(&password, PASSWORD).unwrap();
    fs::write(&wrong, "else").unwrap();
    for file in [&password, &wrong] {
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let encrypted = archive("encrypted-zstd.hxz");
    let with = |file: &Path| {
        let options = ["--json", "--password-file"].map(OsString::from);
        verify(options.into_iter().chain([file.into(), encrypted.clone().into()]))
    };
    assert_eq!(with(&password).code, Some(0));
    let unreadable = with(Path::new("/nowhere"));
    assert_eq!((unreadable.code, unreadable.stdout.as_str()), (Some(3), ""));
    assert!(unreadable.stderr.contains("/nowhere"), "{}", unreadable.stderr);
    for (ended, reason) in [
        (with(&wrong), "wrong_password"),
        (verify(["--json".into(), encrypted.clone()]), "password_needed"),
        (verify(["--json".into(), archive("tree.hxz")]), "directory_archive"),
        (verify(["--json", "/nowhere.hxz"]), "io"),
        (verify(["--json", "/dev/null"]), "io"),
    ] {
        assert_eq!(ended.code, Some(3), "{}", ended.stderr);
        assert_eq!(objects(&ended)[0]["reason"], reason, "{}", ended.stdout);
    }
    // Without JSON, people read the reason in the log.
    let ended = verify([&encrypted]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""));
    assert!(ended.stderr.contains("reason=\"password_needed\""), "{}", ended.stderr);
    // The others are checked all the same.
    let ended = verify(["--json".into(), encrypted.clone(), archive("base-zstd.hxz")]);
    assert_eq!(ended.code, Some(3));
    let objects = objects(&ended);
    assert_eq!(objects[0]["event"], "unopened");
    assert_eq!(objects[0]["reason"], "password_needed");
    assert_eq!((&objects[1]["event"], &objects[1]["is_sound"]), (&"summary".into(), &true.into()));
    for bad in [&["--jobs", "0", "x"][..], &["--jobs", "1025", "x"], &[], &["--nonsense", "x"]] {
        assert_eq!(verify(bad.iter()).code, Some(2), "{bad:?}");
    }
}

/// A parent's fault is told in bytes of the child, and is what clients of it get.
#[test]
fn damage_as_clients_see_it() {
    let folder = tempfile::tempdir().unwrap();
    let blocks: Vec<Vec<u8>> = (0..8).map(|seed| text(seed, 4096)).collect();
    let main = blocks.iter().cloned().map(Piece::Data).collect();
    let mut parent = ArchiveWriter { main, ..ArchiveWriter::default() }.write();
    let stored = parent.main[0].blocks[3].stored.start;
    parent.bytes[stored] ^= 1;
    parent.save(&folder.path().join("parent.hxz"));
    // The other way round, and twice.
    let main: Vec<_> = blocks.iter().rev().chain(&blocks).cloned().map(Piece::InParent).collect();
    let child = ArchiveWriter { main, parents: vec!["parent.hxz".into()], ..Default::default() };
    let path = folder.path().join("child.hxz");
    child.write().save(&path);

    for jobs in ["1", "5"] {
        let ended = verify(["--jobs".into(), jobs.into(), "--json".into(), path.clone()]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let objects = objects(&ended);
        assert_eq!(objects.len(), 2);
        let (fault, summary) = (&objects[0], &objects[1]);
        assert_eq!((&fault["event"], &fault["reason"]), (&"fault".into(), &"crc".into()));
        assert_eq!(fault["archive"], path.to_str().unwrap());
        assert_eq!(fault["file"], folder.path().join("parent.hxz").to_str().unwrap());
        assert_eq!((&fault["file_offset"], &fault["stream"]), (&stored.into(), &"main".into()));
        let ranges = r#"[{"length":4096,"offset":16384},{"length":4096,"offset":45056}]"#;
        assert_eq!(fault["ranges"].to_string(), ranges);
        assert_eq!(summary["unreadable_bytes"], 8192);
        assert_eq!((&summary["is_complete"], &summary["is_sound"]), (&true.into(), &false.into()));
    }
    let ended = verify([&path]);
    assert_eq!(ended.code, Some(1));
    for part in ["[crc]\n", "16384 to 20479\n", "45056 to 49151\n", "8192 of 65536 bytes"] {
        assert!(ended.stdout.contains(part), "{}", ended.stdout);
    }

    let server = Server::start([&path]);
    let mut client = server.go("");
    for number in 0..16_u64 {
        let failed = client.read(number * 4096, 4096).is_err();
        assert_eq!(failed, [4, 11].contains(&number), "{number}");
    }
}

#[test]
fn signatures_and_digests_count_here_too() {
    let signed = archive("signed-zstd.hxz").into_os_string();
    let key = archive("signed.public.key").into_os_string();
    let verify_key = OsString::from("--verify-key");
    assert_eq!(verify([verify_key.clone(), key.clone(), signed.clone()]).code, Some(0));
    let base = archive("base-zstd.hxz").into_os_string();
    assert_eq!(verify([verify_key, key, base.clone()]).code, Some(3));

    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("list");
    let printed = run([OsString::from("digest"), base.clone(), signed.clone()]);
    let expected = [&base, &signed]
        .map(|path| format!("{}  {}\n", blake3::hash(&fs::read(path).unwrap()), path.display()))
        .concat();
    assert_eq!((printed.code, printed.stdout), (Some(0), expected.clone()));
    fs::write(&list, &expected).unwrap();
    let with_list =
        |archive: OsString| verify([OsString::from("--digest"), list.clone().into(), archive]);
    assert_eq!(with_list(base).code, Some(0));
    // Its parent is listed, and it is not.
    assert_eq!(with_list(archive("child-zstd.hxz").into()).code, Some(3));
    assert_eq!(run(["digest", "/nowhere"]).code, Some(3));
}

fn spawn(args: &[OsString]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    command.env_remove("RUST_LOG").args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn end_by(child: Child, signal: Signal) -> Output {
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal).unwrap();
    child.wait_with_output().unwrap()
}

fn has_thread(child: &Child, name: &str) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .any(|comm| comm.trim() == name)
}

/// A check that would take minutes.
#[test]
fn interrupted_while_it_checks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.hxz");
    let length = 32 << 20;
    let stored = zstd::bulk::compress(&vec![0; length as usize], 1).unwrap();
    let main = vec![Piece::Raw { stored, length, hash: [0; 32] }; 20_000];
    let writer = ArchiveWriter { main, deduplicated: false, ..ArchiveWriter::default() };
    writer.write().save(&path);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let args = [
            "verify".into(),
            "--json".into(),
            "--jobs".into(),
            "2".into(),
            path.clone().into(),
            path.clone().into(),
        ];
        let child = spawn(&args);
        wait_until("it checks", || has_thread(&child, "verify"));
        let ended = end_by(child, signal);
        assert_eq!(ended.status.code(), Some(code));
        // The summary of the first archive alone.
        let summary: Value = serde_json::from_slice(&ended.stdout).unwrap();
        assert_eq!((&summary["is_complete"], &summary["faults"]), (&false.into(), &0.into()));
    }
}

/// A file of a TiB that is to be hashed first: zeros that aren't anywhere.
#[test]
fn interrupted_while_it_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.hxz");
    let writer = ArchiveWriter { signature: Some([0; 64]), ..ArchiveWriter::of_image(b"x", 1) };
    writer.write().save(&path);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    let pin = OsString::from(format!("huge.hxz={}", "0".repeat(64)));
    for command in ["verify", "--listen=127.0.0.1:0"] {
        let child = spawn(&[command.into(), "--digest".into(), pin.clone(), path.clone().into()]);
        wait_until("it hashes", || has_thread(&child, "hash"));
        let ended = end_by(child, Signal::INT);
        let expected = if command == "verify" { 130 } else { 0 };
        assert_eq!(ended.status.code(), Some(expected), "{command}");
    }
}

#[test]
fn help_says_what_the_exit_codes_are() {
    let ended = verify(["--help"]);
    assert_eq!(ended.code, Some(0));
    for words in ["EXIT STATUS", "--verify-key", "--digest", "--jobs", "--no-progress", "130"] {
        assert!(ended.stdout.contains(words), "{words}");
    }
}
