//! SIGHUP for commands: it must not end them as a bystander of a reload, and must end them when
//! their terminal is closed.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::clients::run;
use crate::support::wait_until;

const BINARY: &str = env!("CARGO_BIN_EXE_hexz-nbd");

/// The last line that the demo prints when it waits for signals.
const SERVING: &str = "after: sudo umount";

/// Starts the demo, which runs until it is told to end, and waits until it does.
fn demo(wrapper: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let words = [wrapper, &[BINARY, "demo"]].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(SERVING) {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "it has ended");
    }
    (child, output)
}

fn signal(child: &Child, name: &str) {
    run("sh", &["-c", &format!("kill -{name} {}", child.id())]).ok();
}

/// As by `pkill -HUP hexz-nbd`.
#[test]
fn a_command_ignores_the_signal() {
    // setsid: without a terminal, wherever the tests run.
    let (mut child, _output) = demo(&["setsid", "--wait"]);
    // setsid forks only if it leads a process group, as children of a shell with job control do.
    signal(&child, "HUP");
    // Signals are handled in the order of their numbers.
    signal(&child, "TERM");
    let status = child.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}

#[test]
fn a_command_ends_with_its_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let socket = at("tmux");
    let tmux =
        |args: &[&str]| run("tmux", &[&["-S", &socket, "-f", "/dev/null"], args].concat()).ok();
    let start = |name: &str, wrapper: &str| -> String {
        let (pid, output) = (at(&format!("{name}.pid")), at(name));
        // Without a descriptor of it, tmux closes the terminal at once.
        let command = format!("echo $$ >{pid}; exec {wrapper} {BINARY} demo >{output} 2>&1 3<&0");
        tmux(&["new-session", "-d", "-s", name, &command]);
        wait_until("it serves", || {
            std::fs::read_to_string(&output).is_ok_and(|text| text.contains(SERVING))
        });
        std::fs::read_to_string(pid).unwrap().trim().to_owned()
    };
    let ordinary = start("ordinary", "");
    let kept = start("kept", "nohup");
    let is_running = |pid: &str| {
        let status = std::fs::read_to_string(Path::new("/proc").join(pid).join("status"));
        status.is_ok_and(|status| !status.contains("State:\tZ"))
    };
    // While the terminal is there, the signal means nothing.
    for pid in [&ordinary, &kept] {
        run("sh", &["-c", &format!("kill -HUP {pid}")]).ok();
        assert!(is_running(pid));
    }
    tmux(&["kill-server"]);
    wait_until("it has ended", || !is_running(&ordinary));
    // It got the signal as well, and earlier or later has handled it.
    let pending = |pid: &str| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let mask = |field: &str| {
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            u64::from_str_radix(line.split_ascii_whitespace().nth(1).unwrap(), 16).unwrap()
        };
        (mask("SigPnd:") | mask("ShdPnd:")) & 1 == 1
    };
    wait_until("the signal has been handled", || !pending(&kept));
    assert!(is_running(&kept));
    run("sh", &["-c", &format!("kill -TERM {kept}")]).ok();
    wait_until("it ends when it is told to", || !is_running(&kept));
}
