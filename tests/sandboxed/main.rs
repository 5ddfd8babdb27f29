//! The sandbox from inside. It can't be left, and has to be entered before there is a second
//! thread, so each attempt is a process of its own: this program again, told what to try.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test that can't go on shall panic"
)]

#[cfg(feature = "remote")]
mod dialer;
mod sockets;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use nbd_sandbox::{Mode, SandboxError, SandboxPlan};
use rustix::fs::{CWD, Mode as FileMode, OFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
use socket2::{Domain, SockAddr, Socket, Type};
use sockets::{Held, SOCKETS};

/// What a process is to come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    /// A call failed with this number.
    Refused(i32),
    /// The kernel ended it.
    Killed(i32),
}
use End::{Done, Killed, Refused};

const EACCES: i32 = 13;
const ENOSYS: i32 = 38;
const SIGABRT: i32 = 6;
const SIGSYS: i32 = 31;

/// What it is called, what is done, and what it has to come to.
type Attempt = (&'static str, fn(&Place) -> io::Result<()>, End);

const ATTEMPTS: &[Attempt] = &[
    ("read what is allowed", |place| is_read(&place.inside("file")), Done),
    ("list what is allowed", |place| fs::read_dir(place.inside("")).map(drop), Done),
    ("read elsewhere", |place| is_read(&place.outside("file")), Refused(EACCES)),
    ("read elsewhere by a link", |place| is_read(&place.inside("link")), Refused(EACCES)),
    ("read elsewhere by dots", |place| is_read(&place.inside("../out/file")), Refused(EACCES)),
    ("read the shadow file", |_| is_read(Path::new("/etc/shadow")), Refused(EACCES)),
    ("read own memory", |_| is_read(Path::new("/proc/self/environ")), Refused(EACCES)),
    ("ask what is elsewhere", |place| fs::metadata(place.outside("file")).map(drop), Done),
    ("list elsewhere", |place| fs::read_dir(place.outside("")).map(drop), Refused(EACCES)),
    ("read elsewhere in a thread", in_a_thread, Refused(EACCES)),
    ("write", |place| fs::write(place.inside("new"), "x"), Refused(ENOSYS)),
    ("append", append, Refused(ENOSYS)),
    ("rename", |place| fs::rename(place.inside("file"), place.inside("b")), Refused(ENOSYS)),
    ("make a folder", |place| fs::create_dir(place.inside("folder")), Refused(ENOSYS)),
    ("remove a file", |place| fs::remove_file(place.inside("file")), Refused(EACCES)),
    ("remove a socket", |place| fs::remove_file(place.sockets("s")), Done),
    ("make a socket", |_| Socket::new(Domain::IPV4, Type::STREAM, None).map(drop), Refused(ENOSYS)),
    ("connect", |place| place.socket.connect(&place.listener), Refused(ENOSYS)),
    ("listen", |place| place.socket.bind(&any_port()), Refused(ENOSYS)),
    ("send a datagram", send_datagram, Refused(ENOSYS)),
    ("tell the manager", |place| place.managers[0].send(b"READY=1").map(drop), Done),
    ("tell an abstract manager", |place| place.managers[1].send(b"READY=1").map(drop), Done),
    ("look at others' threads", |_| fs::read_dir("/proc/1/task").map(drop), Refused(EACCES)),
    ("send a signal", send_signal, Refused(ENOSYS)),
    ("start a program", |_| Command::new("/bin/true").status().map(drop), Refused(ENOSYS)),
    ("make a pipe", |_| io::pipe().map(drop), Refused(ENOSYS)),
    ("copy a descriptor", |place| Ok(rustix::io::dup(&place.socket).map(drop)?), Refused(ENOSYS)),
    ("become a program", |_| Err(Command::new("/bin/true").exec()), Killed(SIGSYS)),
    ("become a user", become_a_user, Killed(SIGSYS)),
    ("allow core dumps", allow_dumps, Refused(ENOSYS)),
    ("raise a limit", raise_a_limit, Refused(ENOSYS)),
    ("abort", |_| std::process::abort(), Killed(SIGABRT)),
    ("panic in a thread", panic_in_a_thread, Done),
];

/// The same where a file is appended to: in one way, in one folder, and nothing else.
const WITH_AUDIT: &[Attempt] = &[
    ("append to the audit", |place| append_to(&place.audit("file"), APPENDING, 0o640), Done),
    ("make the audit anew", |place| append_to(&place.audit("new"), APPENDING, 0o640), Done),
    ("append by a link", |place| append_to(&place.audit("link"), APPENDING, 0o640), Refused(ELOOP)),
    ("make it with more rights", with_more_rights, Refused(ENOSYS)),
    ("cut the audit", |place| also(place, OFlags::TRUNC), Refused(ENOSYS)),
    ("make none but new ones", |place| also(place, OFlags::EXCL), Refused(ENOSYS)),
    ("write over it", |place| append_to(&place.audit("file"), OVER, 0o640), Refused(ENOSYS)),
    ("append as others do", append_to_the_audit, Refused(ENOSYS)),
    ("append no more", append_no_more, Refused(ENOSYS)),
    ("read the audit", |place| is_read(&place.audit("file")), Refused(EACCES)),
    ("list the audit", |place| fs::read_dir(place.audit("")).map(drop), Refused(EACCES)),
    (
        "append elsewhere",
        |place| append_to(&place.outside("file"), APPENDING, 0o640),
        Refused(EACCES),
    ),
    (
        "append to what is read",
        |place| append_to(&place.inside("file"), APPENDING, 0o640),
        Refused(EACCES),
    ),
    (
        "make a file elsewhere",
        |place| append_to(&place.inside("new"), APPENDING, 0o640),
        Refused(EACCES),
    ),
    ("remove the audit", |place| fs::remove_file(place.audit("file")), Refused(EACCES)),
    (
        "rename the audit",
        |place| fs::rename(place.audit("file"), place.audit("b")),
        Refused(ENOSYS),
    ),
    ("write", |place| fs::write(place.audit("other"), "x"), Refused(ENOSYS)),
];

/// Attempts by the name of their set. Those of the last one are made outside the sandbox as well.
const SETS: &[(&str, &[Attempt])] = &[
    ("plain", ATTEMPTS),
    ("audit", WITH_AUDIT),
    #[cfg(feature = "remote")]
    ("gateway with a dialer", dialer::WITH_DIALER),
    #[cfg(feature = "remote")]
    ("dialer", dialer::DIALER),
    (CONTROLLED, SOCKETS),
];
const CONTROLLED: &str = "sockets";

/// On which side of the sandbox's border an attempt is made.
const INSIDE: &str = "inside";
const OUTSIDE: &str = "outside";

const ELOOP: i32 = 40;
const OVER: OFlags = OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::CLOEXEC);
const APPENDING: OFlags =
    OVER.union(OFlags::APPEND).union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK);

/// Where a process is to try it.
struct Place {
    folder: PathBuf,
    listener: SockAddr,
    /// Made before the sandbox was entered, as are the service manager's.
    socket: Socket,
    managers: [UnixDatagram; 2],
    held: Held,
    #[cfg(feature = "remote")]
    dialers: Option<dialer::Dialers>,
}

impl Place {
    #[cfg(feature = "remote")]
    fn dialers(&self) -> &dialer::Dialers {
        self.dialers.as_ref().unwrap()
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.folder.join("in").join(name)
    }

    fn outside(&self, name: &str) -> PathBuf {
        self.folder.join("out").join(name)
    }

    fn sockets(&self, name: &str) -> PathBuf {
        self.folder.join("sockets").join(name)
    }

    fn audit(&self, name: &str) -> PathBuf {
        self.folder.join("audit").join(name)
    }

    fn plan(&self, appends: bool) -> SandboxPlan {
        SandboxPlan {
            appended: if appends { vec![self.audit("file")] } else { Vec::new() },
            mode: Mode::Require,
            folders: vec![self.inside("")],
            sockets: vec![self.sockets("s")],
            #[cfg(feature = "remote")]
            receives_descriptors_on: self.dialers.as_ref().map(dialer::Dialers::descriptor),
            ..SandboxPlan::default()
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["try", what, set, side, folder, port] => end(attempt(what, set, side, folder, port)),
        ["without", call, ref command @ ..] => without(call, command),
        #[cfg(feature = "remote")]
        ["dialer"] => dialer::run(),
        _ => {
            test(&args);
            ExitCode::SUCCESS
        }
    }
}

/// Says how it went: 0, or the number of the error.
fn end(result: io::Result<()>) -> ! {
    let code = result.map_or_else(|error| error.raw_os_error().unwrap_or(255), |()| 0);
    std::process::exit(code)
}

fn attempt(what: &str, set: &str, side: &str, folder: &str, port: &str) -> io::Result<()> {
    let place = Place {
        folder: folder.into(),
        listener: format!("127.0.0.1:{port}").parse::<std::net::SocketAddr>().unwrap().into(),
        socket: Socket::new(Domain::IPV4, Type::STREAM, None)?,
        managers: [UnixDatagram::unbound()?, UnixDatagram::unbound()?],
        held: Held::new()?,
        #[cfg(feature = "remote")]
        dialers: match set {
            "gateway with a dialer" => Some(dialer::Dialers::start(port.parse().unwrap())?),
            _ => None,
        },
    };
    place.managers[0].connect(place.sockets("manager"))?;
    place.managers[1].connect_addr(&abstract_manager(Path::new(folder)))?;
    #[cfg(feature = "remote")]
    if set == "dialer" {
        dialer::enter(&place);
    }
    if side == INSIDE && set != "dialer" {
        let report = nbd_sandbox::enter(&place.plan(set == "audit")).unwrap();
        assert!(report.missing.is_empty() && report.notes.is_empty(), "{report:?}");
    }
    let (_, attempts) = SETS.iter().find(|(name, _)| *name == set).unwrap();
    let (_, attempt, _) = attempts.iter().find(|(name, ..)| *name == what).unwrap();
    attempt(&place)
}

/// Runs a command where the kernel lacks a system call.
fn without(call: &str, command: &[&str]) -> ! {
    let call = match call {
        "landlock" => libc::SYS_landlock_create_ruleset,
        "seccomp" => libc::SYS_seccomp,
        other => panic!("{other}"),
    };
    let missing = SeccompAction::Errno(ENOSYS.unsigned_abs());
    let here = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let calls = BTreeMap::from([(call, vec![])]);
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, missing, here).unwrap();
    let filter: seccompiler::BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
    panic!("{}", Command::new(command[0]).args(&command[1..]).exec())
}

/// Runs the tests whose names contain one of the words in `args`, or all.
fn test(args: &[String]) {
    let words: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(*word));
    if args.iter().any(|arg| arg == "--list") {
        return;
    }
    let mut count = 0;
    let all = SETS.iter().flat_map(|(set, attempts)| attempts.iter().map(move |it| (*set, it)));
    for (set, (name, _, expected)) in all.filter(|(_, (name, ..))| is_wanted(name)) {
        assert_eq!(outcome(name, set, INSIDE), *expected, "{name} ({set})");
        if set == CONTROLLED {
            assert_eq!(outcome(name, set, OUTSIDE), Done, "{name} ({set}, without the sandbox)");
        }
        count += 1;
    }
    let others: [(&str, fn()); 4] = [
        ("a second thread", a_second_thread),
        ("require says what is missing", require_says_what_is_missing),
        ("auto goes on", auto_goes_on),
        ("off", off),
    ];
    for (_, test) in others.iter().filter(|(name, _)| is_wanted(name)) {
        test();
        count += 1;
    }
    println!("{count} attempts came to what they should");
}

/// What comes of an attempt in a process of its own.
fn outcome(what: &str, set: &str, side: &str) -> End {
    let folder = tempfile::tempdir().unwrap();
    for name in ["in", "out", "sockets", "audit"] {
        fs::create_dir(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name).join("file"), "x").unwrap();
    }
    symlink("../out/file", folder.path().join("in/link")).unwrap();
    symlink("file", folder.path().join("audit/link")).unwrap();
    fs::write(folder.path().join("sockets/s"), "").unwrap();
    let _receivers = [
        UnixDatagram::bind(folder.path().join("sockets/manager")).unwrap(),
        UnixDatagram::bind(folder.path().join("sockets/other")).unwrap(),
        UnixDatagram::bind_addr(&abstract_manager(folder.path())).unwrap(),
    ];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();

    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["try", what, set, side]).arg(folder.path()).arg(port);
    command.env("AWS_SECRET_ACCESS_KEY", "secret");
    let output = command.output().unwrap();
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => Done,
        (Some(code @ (255 | 101)), _) => {
            panic!("{what}: {code}: {}", String::from_utf8_lossy(&output.stderr))
        }
        (Some(error), _) => Refused(error),
        (None, signal) => Killed(signal.unwrap()),
    }
}

fn is_read(path: &Path) -> io::Result<()> {
    fs::read(path).map(drop)
}

fn append(place: &Place) -> io::Result<()> {
    File::options().append(true).open(place.inside("file")).map(drop)
}

fn append_to(path: &Path, flags: OFlags, mode: u32) -> io::Result<()> {
    let file = rustix::fs::openat(CWD, path, flags, FileMode::from_raw_mode(mode))?;
    rustix::io::write(&file, b"x")?;
    Ok(rustix::fs::fdatasync(&file)?)
}

fn also(place: &Place, flags: OFlags) -> io::Result<()> {
    append_to(&place.audit("file"), APPENDING | flags, 0o640)
}

fn with_more_rights(place: &Place) -> io::Result<()> {
    append_to(&place.audit("new"), APPENDING, 0o666)
}

fn append_to_the_audit(place: &Place) -> io::Result<()> {
    File::options().append(true).open(place.audit("file")).map(drop)
}

/// A file that is open isn't made one that could be written over.
fn append_no_more(place: &Place) -> io::Result<()> {
    let mode = FileMode::from_raw_mode(0o640);
    let file = rustix::fs::openat(CWD, place.audit("file"), APPENDING, mode)?;
    Ok(rustix::fs::fcntl_setfl(&file, OFlags::empty())?)
}

fn in_a_thread(place: &Place) -> io::Result<()> {
    std::thread::scope(|scope| scope.spawn(|| is_read(&place.outside("file"))).join().unwrap())
}

/// Of a name that no other test has.
fn abstract_manager(folder: &Path) -> SocketAddr {
    SocketAddr::from_abstract_name(folder.as_os_str().as_encoded_bytes()).unwrap()
}

fn any_port() -> SockAddr {
    std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()
}

fn send_datagram(place: &Place) -> io::Result<()> {
    UnixDatagram::unbound()?.send_to(b"READY=1", place.sockets("manager")).map(drop)
}

fn send_signal(_: &Place) -> io::Result<()> {
    let parent = rustix::process::getppid().unwrap();
    Ok(rustix::process::kill_process(parent, Signal::CONT)?)
}

fn become_a_user(_: &Place) -> io::Result<()> {
    Ok(rustix::thread::set_thread_uid(rustix::process::getuid())?)
}

fn allow_dumps(_: &Place) -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

fn raise_a_limit(_: &Place) -> io::Result<()> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    Ok(rustix::process::setrlimit(Resource::Core, none)?)
}

fn panic_in_a_thread(_: &Place) -> io::Result<()> {
    assert!(std::thread::spawn(|| panic!("for a test")).join().is_err());
    Ok(())
}

fn a_second_thread() {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || wait.recv());
    let entered = nbd_sandbox::enter(&SandboxPlan::default());
    assert!(matches!(entered, Err(SandboxError::Threads(2))), "{entered:?}");
    drop(release);
    assert!(thread.join().unwrap().is_err());
}

fn off() {
    let report =
        nbd_sandbox::enter(&SandboxPlan { mode: Mode::Off, ..SandboxPlan::default() }).unwrap();
    assert_eq!(report, nbd_sandbox::SandboxReport::default());
    assert!(Command::new("/bin/true").status().unwrap().success());
}

/// The server where the kernel lacks `call`. It finds no archive, so that it ends in any case:
/// with 3 if it went on.
fn server_without(call: &str, mode: &str) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let Output { status, stderr, .. } = command
        .args(["without", call, env!("CARGO_BIN_EXE_hexz-nbd"), "--sandbox", mode])
        .args(["-v", "--listen", "127.0.0.1:0"])
        .arg(folder.path().join("none.hxz"))
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

fn require_says_what_is_missing() {
    for (call, name) in [("landlock", "Landlock"), ("seccomp", "seccomp")] {
        let (code, stderr) = server_without(call, "require");
        assert_eq!(code, Some(6), "{stderr}");
        let missing = format!(" {name} (");
        let error = stderr.lines().find(|line| line.contains("sandbox_unavailable")).unwrap();
        assert!(error.contains(&missing), "{stderr}");
    }
}

fn auto_goes_on() {
    for (call, gone, there) in
        [("landlock", "Landlock", "seccomp"), ("seccomp", "seccomp", "Landlock")]
    {
        let (code, stderr) = server_without(call, "auto");
        assert_eq!(code, Some(3), "{stderr}");
        let line = |start: &str| stderr.lines().find(|line| line.contains(start)).unwrap();
        assert!(line("reason=\"sandbox_incomplete\"").contains(gone), "{stderr}");
        let enforced = line("DEBUG sandbox: no new privileges");
        assert!(enforced.contains(there) && !enforced.contains(gone), "{stderr}");
    }
}
