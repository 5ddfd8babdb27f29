//! The built binary, run until it ends.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::PATIENCE;

/// How a program that ended by itself did so.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

fn binary() -> Command {
    binary_in(&[])
}

/// The binary, run by another program.
pub(super) fn binary_in(wrapper: &[OsString]) -> Command {
    let binary = OsStr::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    let mut words = wrapper.iter().map(OsString::as_os_str).chain([binary]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    // What the caller's environment says must not change what is tested.
    for variable in [
        "RUST_LOG",
        "HEXZ_PASSWORD",
        "CREDENTIALS_DIRECTORY",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
    ] {
        command.env_remove(variable);
    }
    let of_stores = |name: &OsStr| {
        let name = name.to_string_lossy().to_ascii_uppercase();
        ["AWS_", "AZURE_", "GOOGLE_"].iter().any(|prefix| name.starts_with(prefix))
            || name.ends_with("_PROXY")
    };
    for (variable, _) in std::env::vars_os().filter(|(name, _)| of_stores(name)) {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs the binary until it ends, as it should soon.
pub fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Ended {
    let mut command = binary();
    command.args(args);
    run_command(command, None)
}

/// Runs the binary, which must refuse to start: exit code and standard error.
pub fn run_to_failure<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> (i32, String) {
    let ended = run(args);
    let code = ended.code.expect("ended by a signal");
    assert_ne!(code, 0, "it should have failed: {}", ended.stderr);
    (code, ended.stderr)
}

pub(super) fn run_command(mut command: Command, stdout: Option<Stdio>) -> Ended {
    let stdout = stdout.unwrap_or_else(Stdio::piped);
    let mut child = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
    // It holds what the child was given.
    drop(command);
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = wait(&mut child, PATIENCE);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    let status = status.unwrap_or_else(|| panic!("it goes on and on: {stdout}{stderr}"));
    Ended { code: status.code(), stdout, stderr }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

pub(super) fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
