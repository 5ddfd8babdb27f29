//! What the running server has given up, and that it serves all the same. What each refusal is
//! like from inside is in `tests/sandboxed`.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::{BASE, plain};
use crate::support::client::{OPT_GO, REP_ERR_UNKNOWN, info_data};
use crate::support::server::{Builder, Server};
use crate::support::{IMAGE_SIZE, PASSWORD, archive, image, is_root};

const CHILD: &str = "child-zstd.hxz";
const REQUIRED: [&str; 2] = ["--sandbox", "require"];

/// `/proc/PID/task/*/status` of all threads.
fn threads(server: &Server) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    // Those of the runtime come and go.
    tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok()).collect()
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{name}")).split_ascii_whitespace().collect()
}

fn copy(from: &str, to: &Path) {
    let new = to.with_extension("new");
    fs::copy(archive(from), &new).unwrap();
    fs::rename(new, to).unwrap();
}

fn is_refused(server: &Server, name: &str) {
    server.greeted().refused(OPT_GO, &info_data(name.as_bytes(), &[]), REP_ERR_UNKNOWN);
}

fn reads_as_the_image(server: &Server, name: &str) {
    assert!(server.go(name).read_ok(0, IMAGE_SIZE as u32) == image(), "{name}");
}

/// A folder that others may look into.
fn open_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
}

fn dir(folder: &Path) -> Builder {
    Server::builder().args(REQUIRED).arg("--export-dir").arg(folder)
}

#[test]
fn no_thread_is_outside() {
    let server = plain().args(REQUIRED).start();
    reads_as_the_image(&server, "");
    let threads = threads(&server);
    // The runtime's, and those that decode.
    assert!(threads.iter().any(|thread| thread.contains("decoder-0")));
    assert!(threads.iter().any(|thread| thread.contains("tokio")));
    for thread in &threads {
        assert_eq!(field(thread, "NoNewPrivs"), ["1"]);
        assert_eq!(field(thread, "Seccomp"), ["2"]);
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(field(thread, set), ["0000000000000000"]);
        }
        // To read any file is what root goes on needing.
        let capabilities = u64::from_str_radix(field(thread, "CapPrm")[0], 16).unwrap();
        assert_eq!(capabilities & !(1 << 2), 0, "{capabilities:x}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_ascii_whitespace().nth(4), Some("0"), "{core}");
    // What belongs to root there is closed to all others.
    let memory = fs::metadata(format!("/proc/{}/environ", server.pid())).unwrap();
    assert_eq!(memory.uid(), 0);
}

#[test]
fn one_line_says_what_is_in_force() {
    let server = plain().args(REQUIRED).arg("-v").start();
    let line = server.wait_for_message("sandbox: ");
    assert_eq!(line.json["level"], "DEBUG");
    let folder = archive("").canonicalize().unwrap();
    let reads = format!("reads {}/", folder.display());
    for part in ["no new privileges", "no core dumps", "Landlock (ABI ", &reads, "seccomp"] {
        assert!(line.message().contains(part), "{part}: {}", line.text);
    }
    assert_eq!(server.has_reason("running_as_root"), is_root());
}

#[test]
fn it_can_be_switched_off() {
    let server = plain().args(["-v", "--sandbox", "off"]).start();
    assert_eq!(server.wait_for_message("sandbox: ").message(), "sandbox: off");
    reads_as_the_image(&server, "");
    for thread in threads(&server) {
        assert_eq!(
            field(&thread, "Seccomp"),
            field(&fs::read_to_string("/proc/self/status").unwrap(), "Seccomp")
        );
    }
}

#[test]
fn what_comes_later_is_found() {
    let (exports, parents) = (open_folder(), open_folder());
    let server = dir(exports.path()).arg("--parent-dir").arg(parents.path()).start();
    copy(BASE, &exports.path().join("late.hxz"));
    reads_as_the_image(&server, "late.hxz");
    copy("fixed-4k-zstd.hxz", &exports.path().join("late.hxz"));
    reads_as_the_image(&server, "late.hxz");

    copy(CHILD, &exports.path().join(CHILD));
    is_refused(&server, CHILD);
    copy(BASE, &parents.path().join(BASE));
    copy(CHILD, &exports.path().join(CHILD));
    server.go(CHILD).read_ok(0, IMAGE_SIZE as u32);
    assert_eq!(server.greeted().list(), [CHILD, "late.hxz"]);
}

/// A link in a folder doesn't open what it leads to, whoever put it there.
#[test]
fn what_is_elsewhere_is_closed() {
    let (inside, outside) = (open_folder(), open_folder());
    copy(CHILD, &inside.path().join(CHILD));
    let elsewhere = outside.path().join("elsewhere.hxz");
    copy(BASE, &elsewhere);
    symlink(&elsewhere, inside.path().join(BASE)).unwrap();

    let server = dir(inside.path()).start();
    is_refused(&server, CHILD);
    let line = server.wait_for_reason("io");
    assert!(line.text.contains(BASE) && line.text.contains("Permission denied"), "{}", line.text);
    drop(server);
    // Unless one says so.
    for more in [["--parent-dir", outside.path().to_str().unwrap()], ["--sandbox", "off"]] {
        let builder = Server::builder().arg("--export-dir").arg(inside.path());
        builder.args(more).start().go(CHILD).read_ok(0, IMAGE_SIZE as u32);
    }
}

#[test]
fn parents_anywhere_keep_everything_readable() {
    let (inside, outside) = (open_folder(), open_folder());
    copy(CHILD, &inside.path().join(CHILD));
    copy(BASE, &outside.path().join(BASE));
    symlink(outside.path().join(BASE), inside.path().join(BASE)).unwrap();
    let server = dir(inside.path()).args(["-v", "--allow-parent-anywhere"]).start();
    server.wait_for_message("reads everywhere");
    server.go(CHILD).read_ok(0, IMAGE_SIZE as u32);
}

/// The operator's own paths may be links, and lead elsewhere later.
#[test]
fn links_may_be_exchanged() {
    let (links, files) = (open_folder(), open_folder());
    for (from, to) in [(BASE, "1.hxz"), ("text-dict-zstd.hxz", "2.hxz")] {
        copy(from, &files.path().join(to));
    }
    let link = links.path().join("disk.hxz");
    symlink(files.path().join("1.hxz"), &link).unwrap();
    let server = Server::builder().args(REQUIRED).arg(&link).start();
    reads_as_the_image(&server, "disk.hxz");

    let new = links.path().join("new");
    symlink(files.path().join("2.hxz"), &new).unwrap();
    fs::rename(&new, &link).unwrap();
    assert_eq!(server.greeted().go("disk.hxz").size, 700_000);
    // Or be a file.
    copy(BASE, &link);
    reads_as_the_image(&server, "disk.hxz");
}

/// As Kubernetes renews secrets: `..data` leads to another folder.
#[test]
fn a_secret_is_read_anew_through_links() {
    let (exports, secrets) = (open_folder(), open_folder());
    let (disk, secrets) = (exports.path().join("disk.hxz"), secrets.path());
    let write = |version: &str, password: &str| {
        let path = secrets.join(version);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("password"), password).unwrap();
        fs::set_permissions(path.join("password"), Permissions::from_mode(0o600)).unwrap();
        symlink(version, secrets.join("..new")).unwrap();
        fs::rename(secrets.join("..new"), secrets.join("..data")).unwrap();
    };
    write("..1", PASSWORD);
    symlink("..data/password", secrets.join("password")).unwrap();
    copy("encrypted-lz4.hxz", &disk);
    let builder = Server::builder().args(REQUIRED).arg("--password-file");
    let server = builder.arg(secrets.join("password")).arg(&disk).start();
    reads_as_the_image(&server, "");

    write("..2", "another one");
    fs::remove_dir_all(secrets.join("..1")).unwrap();
    copy("encrypted-zstd.hxz", &disk);
    is_refused(&server, "disk.hxz");
    // It was read, and is another one.
    server.wait_for_reason("wrong_password");
    write("..3", PASSWORD);
    copy("encrypted-zstd.hxz", &disk);
    reads_as_the_image(&server, "");
}

/// All rights of root are gone, but not what was opened with them.
#[test]
fn another_user_goes_on() {
    let folder = open_folder();
    let password = folder.path().join("password");
    fs::write(&password, PASSWORD).unwrap();
    fs::set_permissions(&password, Permissions::from_mode(0o600)).unwrap();
    let disk = folder.path().join("disk.hxz");
    copy("encrypted-lz4.hxz", &disk);
    let socket = folder.path().join("s");
    // Who isn't root may be anybody, but not this one.
    let name = if is_root() { "nobody" } else { "4000000:4000000" };
    let user = |sandbox: &str| {
        Server::builder()
            .args(["--sandbox", sandbox, "--user", name, "--password-file"])
            .args([&password, &disk])
            .listen_unix(&socket)
            .env("HEXZ_PASSWORD", PASSWORD)
    };
    if !is_root() {
        user("require").fails_with(6, "user");
        return;
    }
    // Who gives up root can't read root's files.
    let (code, stderr) = user("require").fail();
    assert_eq!(code, 3, "{stderr}");
    for (path, reason) in [(&password, "file_not_rereadable"), (&socket, "socket_not_removable")] {
        let parts = [path.to_str().unwrap(), &format!("\"{reason}\"")];
        let is_note = |line: &str| parts.iter().all(|part| line.contains(part));
        assert!(stderr.lines().any(is_note), "{reason}: {stderr}");
    }

    std::os::unix::fs::chown(&password, Some(65534), Some(65534)).unwrap();
    std::os::unix::fs::chown(folder.path(), Some(65534), Some(65534)).unwrap();
    for sandbox in ["require", "off"] {
        let mut server = user(sandbox).start();
        reads_as_the_image(&server, "");
        for thread in threads(&server) {
            assert_eq!(field(&thread, "Uid"), ["65534"; 4]);
            assert_eq!(field(&thread, "Gid"), ["65534"; 4]);
            assert!(field(&thread, "Groups").is_empty());
            for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
                assert_eq!(field(&thread, set), ["0000000000000000"]);
            }
        }
        assert!(!server.log_text().contains("\"WARN\""), "{}", server.log_text());
        let memory = fs::metadata(format!("/proc/{}/environ", server.pid())).unwrap();
        assert_eq!(memory.uid(), 0);
        assert_eq!(server.terminate().code(), Some(0));
        assert!(!socket.exists(), "the socket is left behind");
    }
}

#[test]
fn users_that_are_none() {
    for nobody in ["no such user", "nobody:no such group", "4000000", ""] {
        let (code, stderr) = plain().args(["--user", nobody]).fail();
        assert_eq!(code, 2, "{nobody}: {stderr}");
    }
    let (code, _) = plain().args(["--sandbox", "somewhat"]).fail();
    assert_eq!(code, 2);
}
