//! The demonstration, and the example programs.

use std::process::Command;

use crate::clients::{run, run_command};
use crate::support::server::run as run_binary;
use crate::support::{IMAGE_SHA256, archive, nbd_port};

#[test]
fn demo_verifies_the_bytes_that_it_reads() {
    let _port = nbd_port();
    let ended = run_binary(["demo", "--once"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains(IMAGE_SHA256), "{}", ended.stdout);
    assert!(ended.stdout.contains("TLSv1_3"), "{}", ended.stdout);
}

#[test]
fn serve_bytes_serves_bytes() {
    /// Kills the example when the test ends.
    struct Running(std::process::Child);
    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let example = example("serve_bytes");
    let _running = Running(Command::new(example).spawn().unwrap());
    crate::support::wait_until("the example listens", || {
        std::net::TcpStream::connect("127.0.0.1:10811").is_ok()
    });
    let said = run(
        "nbdsh",
        &[
            "-u",
            "nbd://localhost:10811/numbers",
            "-c",
            "print(h.pread(34, 17 * 1000).decode(), end='')",
        ],
    );
    assert_eq!(said.ok(), "line 00000001000\nline 00000001001\n");
}

#[test]
fn read_blocks_lists_blocks() {
    let mut command = Command::new(example("read_blocks"));
    command.arg(archive("grandchild-zstd.hxz"));
    let said = run_command(command).ok();
    for expected in ["child-zstd.hxz", "base-zstd.hxz", "8388608 bytes", "in a parent", "zeros"] {
        assert!(said.contains(expected), "{expected} is missing in {said}");
    }
}

/// Returns the path of an example, which is built beside the tests.
fn example(name: &str) -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples").join(name)
}
