//! Runs a page's steps in namespaces that imitate a machine.

use std::fs;
use std::path::Path;
use std::process::{self, Stdio};
use std::time::{Duration, Instant};

use super::page::{self, Command, Step};
use super::stores;
use crate::archive_writer::{ArchiveWriter, Piece, image, noise, text};
use crate::support::archive;

/// Deadline for a page; none takes that long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(150);

pub const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

/// Runs all steps of a page, and compares their output with the page.
pub fn run(name: &str, steps: &[Step]) {
    let folder = tempfile::tempdir().unwrap();
    let (tools, archives) = (folder.path().join("tools"), folder.path().join("archives"));
    for folder in [&tools, &archives] {
        fs::create_dir(folder).unwrap();
    }
    put_tools(&tools);
    put_archives(&archives);
    let stores = if stores::are_used(steps) { stores::command() } else { "true".to_owned() };
    let script = write_steps(folder.path(), steps);
    fs::write(folder.path().join("script"), script).unwrap();

    let mut command = process::Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--net", "--mount", "--pid", "--fork"])
        .args(["--kill-child", "bash", &in_repository("tests/integration/documents/machine.sh")])
        .envs([("STEPS", folder.path()), ("TOOLS", &tools), ("ARCHIVES", &archives)])
        .env("REPOSITORY", REPOSITORY)
        .env("START_STORES", stores)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let said = folder.path().join("machine");
    let code = wait_for(command, &said);
    compare(name, folder.path(), steps);
    assert_eq!(code, Some(0), "{name}: {}", read(&said));
}

/// Returns a script with a line for each step. The content of a step is in a file with its number.
fn write_steps(folder: &Path, steps: &[Step]) -> String {
    let mut script = String::new();
    for (at, step) in steps.iter().enumerate() {
        let line = match step {
            Step::Run(command) => {
                fs::write(folder.join(format!("{at}.command")), &command.text).unwrap();
                match command {
                    Command { .. } if command.serves() => format!("serve {at}\n"),
                    Command { is_server: true, is_elsewhere: false, .. } => {
                        format!("end\nrun {at} {}\n", command.code)
                    }
                    Command { text, prints: Some(wanted), .. } if observes(text) => {
                        write_fixed(folder, at, wanted);
                        format!("observe {at} {}\n", command.code)
                    }
                    Command { .. } => format!("run {at} {}\n", command.code),
                }
            }
            Step::File { path, text } => {
                fs::write(folder.join(format!("{at}.file")), text).unwrap();
                format!("cp \"$STEPS/{at}.file\" {path} || exit 1\n")
            }
            Step::Log { wanted, .. } => {
                write_fixed(folder, at, wanted);
                format!("wait_for_log {at}\n")
            }
            Step::NotRun { .. } => continue,
        };
        script.push_str(&line);
    }
    script
}

/// Writes the fixed part of each line, for which the script waits.
fn write_fixed(folder: &Path, at: usize, wanted: &[String]) {
    let fixed = wanted.iter().filter_map(|line| line.split('…').max_by_key(|s| s.len()));
    let fixed = fixed.map(|text| format!("{}\n", text.trim())).collect::<String>();
    fs::write(folder.join(format!("{at}.fixed")), fixed).unwrap();
}

/// Returns true if a command shows what another process does, which may take a moment. Readers type
/// more slowly than the test.
fn observes(text: &str) -> bool {
    ["jq ", "curl ", "hexz-nbd top"].iter().any(|command| text.starts_with(command))
}

fn wait_for(mut command: process::Command, said: &Path) -> Option<i32> {
    let out = fs::File::create(said).unwrap();
    let again = out.try_clone().unwrap();
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(again).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            // That kills all processes of the namespace.
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn compare(name: &str, folder: &Path, steps: &[Step]) {
    let out = |at: usize| read(&folder.join(format!("{at}.out")));
    let mut log = String::new();
    for (at, step) in steps.iter().enumerate() {
        let Step::Run(command) = step else { continue };
        let place = format!("{name}:{}: {}", command.line, command.text);
        let printed = out(at);
        let wrong = read(&folder.join(format!("{at}.wrong")));
        let hint = "a program that is missing comes by `make tools`";
        assert_eq!(wrong, "", "{place}\n{printed}\n{wrong}; {hint}");
        if command.serves() {
            log.push_str(&printed);
        }
        if let Some(wanted) = &command.prints {
            let mut wanted = wanted.clone();
            if command.serves() {
                // Pages show only some lines of a log.
                wanted = wanted.into_iter().flat_map(|line| ["…".to_owned(), line]).collect();
                wanted.push("…".to_owned());
            }
            let lines: Vec<&str> = printed.lines().collect();
            let shown = wanted.join("\n");
            assert!(page::fit(&wanted, &lines), "{place}\nprinted\n{printed}\ninstead of\n{shown}");
        }
    }
    for step in steps {
        let Step::Log { line, wanted } = step else { continue };
        for wanted in wanted {
            // Pages may omit the timestamp.
            let anywhere = format!("…{wanted}");
            let said = log.lines().any(|said| page::fits(&anywhere, said));
            assert!(said, "{name}:{line}: no server says\n{wanted}\nbut\n{log}");
        }
    }
    let last = read(&folder.join("last"));
    let begun: usize = last.trim().parse().unwrap_or_default();
    let rest = steps.iter().skip(begun + 1).any(|step| matches!(step, Step::Run(_)));
    assert!(!rest, "{name}: it stopped at step {begun}: {:?}\n{}", steps[begun], out(begun));
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

pub fn in_repository(path: &str) -> String {
    format!("{REPOSITORY}/{path}")
}

/// Installs the programs that precede Debian's in PATH.
fn put_tools(tools: &Path) {
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_hexz-nbd"), tools.join("hexz-nbd")).unwrap();
    let scripts = [
        ("ssh", SSH),
        ("scp", SCP),
        ("sudo", SUDO),
        ("apt", APT),
        ("systemctl", SYSTEMCTL),
        ("aws", AWS),
    ];
    for (name, script) in scripts {
        put_script(&tools.join(name), script);
    }
}

/// All machines of a page are one: runs the command here, connected by pipes.
const SSH: &str = "#!/bin/bash\nshift\ncat | \"$@\" | cat\n";

/// Copies here too, to the path after `HOST:`.
const SCP: &str = r#"#!/bin/bash
target=${@: -1}
exec cp "${@:1:$#-1}" "${target#*:}"
"#;

const SUDO: &str = "#!/bin/bash\nexec \"$@\"\n";

/// `make tools` has installed the packages; a test compares their names with those on the pages.
const APT: &str = "#!/bin/bash\n[[ $1 = install || $1 = update ]]\n";

/// Starts or reloads the services that pages use, without a service manager.
const SYSTEMCTL: &str = r#"#!/bin/bash
case "$*" in
"reload nginx")
    # The old workers may serve a little longer.
    nginx -s reload && sleep 1
    ;;
"restart haproxy")
    haproxy -D -f /etc/haproxy/haproxy.cfg
    ;;
*) exit 2 ;;
esac
"#;

/// Stands in for the AWS command line: prints credentials, and copies into the page's store.
const AWS: &str = r#"#!/bin/bash
case "$*" in
"configure export-credentials --format env-no-export")
    printf 'AWS_ACCESS_KEY_ID=AKIAEXAMPLE\nAWS_SECRET_ACCESS_KEY=secret\n'
    ;;
"s3 cp "*)
    object=/srv/store/${4#s3://}
    mkdir -p "$(dirname "$object")" && cp "$3" "$object"
    ;;
*) exit 2 ;;
esac
"#;

fn put_script(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Creates the snapshots that the pages use: `snap.hexz` is thin over `base.hexz`, `tuesday.hexz`
/// over `monday.hexz`; the others were written by the Hexz tools.
fn put_archives(folder: &Path) {
    const PIECE: usize = 128 << 10;
    let whole: Vec<Piece> = (0..64)
        .map(|at| match at % 4 {
            3 => Piece::Zeros(PIECE as u32),
            2 => Piece::Data(noise(at, PIECE)),
            _ => Piece::Data(text(at, PIECE)),
        })
        .collect();
    let mut later: Vec<Piece> = whole
        .iter()
        .map(|piece| match piece {
            Piece::Data(bytes) => Piece::InParent(bytes.clone()),
            other => other.clone(),
        })
        .collect();
    for at in [5, 6, 40] {
        later[at] = Piece::Data(text(1000 + at as u64, PIECE));
    }
    assert_eq!(image(&later).len(), 8 << 20);
    for (parent, child) in [("base.hexz", "snap.hexz"), ("monday.hexz", "tuesday.hexz")] {
        let writer = ArchiveWriter { main: whole.clone(), ..ArchiveWriter::default() };
        writer.write().save(&folder.join(parent));
        let parents = vec![parent.to_owned()];
        let writer = ArchiveWriter { main: later.clone(), parents, ..ArchiveWriter::default() };
        writer.write().save(&folder.join(child));
    }
    for (from, to) in [
        ("base-zstd.hxz", "disk.hexz"),
        ("base-lz4.hxz", "web-1.hexz"),
        ("fixed-4k-zstd.hxz", "web-2.hexz"),
        ("fixed-64k-zstd.hxz", "web-server.hexz"),
        ("sparse-zstd.hxz", "db.hexz"),
        ("encrypted-zstd.hxz", "secret.hexz"),
        ("tree.hxz", "files.hexz"),
    ] {
        fs::copy(archive(from), folder.join(to)).unwrap();
    }
}
