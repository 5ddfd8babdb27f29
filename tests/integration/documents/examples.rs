//! The demonstration, the example programs, and the unit that renews certificates.

use std::process::Command;

use super::page::{self, Step};
use super::{machine, source};
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

/// Runs the commands of hexz-nbd-renew.service, with two folders in the place of the machines. The
/// keys' restrictions are those of the page.
#[test]
fn renewed_certificates_are_copied() {
    let commands = exec_start(&source("examples/hexz-nbd-renew.service"));
    assert_eq!(commands.len(), 5, "{commands:?}");
    let page = source("docs/certificate-renewal.md");
    let restrictions = page.split("restrict,command=\"").skip(1);
    let restrictions: Vec<&str> = restrictions.map(|it| it.split('"').next().unwrap()).collect();
    let [server, client] = restrictions[..] else { panic!("{restrictions:?}") };
    // rsync calls it as `ssh -l root HOST COMMAND`.
    let ssh = format!(
        "#!/bin/sh\nhost=$3\nshift 3\nexport SSH_ORIGINAL_COMMAND=\"$*\"\ncase $host in\n\
         nbd.example.org) exec {server} ;;\nbackup.example.org) exec {client} ;;\nesac\nexit 255\n"
    );
    let run = |text: &str| Step::Run(page::command(0, text.to_owned()));
    let prints = |text: &str, lines: &[&str]| {
        let prints = Some(lines.iter().map(|&line| line.to_owned()).collect());
        Step::Run(page::Command { prints, ..page::command(0, text.to_owned()) })
    };
    let mut steps = vec![
        run("hexz-nbd pki init"),
        run("hexz-nbd pki server nbd.example.org --days 20"),
        run("hexz-nbd pki client backup.example.org --days 9"),
        // There is only one number in this namespace.
        run("sed -i '1i hexz-nbd:x:0:' /etc/group"),
        run("install -d -m 0755 /etc/hexz-nbd /etc/pki/libnbd"),
        Step::File { path: "ssh-of-test".to_owned(), text: ssh },
        run("chmod +x ssh-of-test; export RSYNC_RSH=$PWD/ssh-of-test"),
    ];
    // Twice: the second time, there are files to replace.
    for issued in ["4", "6"] {
        steps.extend(commands.iter().map(|command| run(command)));
        steps.extend([
            prints("ls pki/issued | wc -l", &[issued]),
            run("diff -r pki/servers/nbd.example.org /etc/hexz-nbd --exclude crl.pem"),
            run("cmp pki/crl.pem /etc/hexz-nbd/crl.pem"),
            run("diff -r pki/clients/backup.example.org /etc/pki/libnbd"),
            prints("stat -c %a /etc/hexz-nbd /etc/pki/libnbd", &["755", "755"]),
            prints("stat -c %a /etc/hexz-nbd/*", &["640", "640", "640", "640"]),
            prints("stat -c %a /etc/pki/libnbd/*", &["600", "600", "600"]),
        ]);
    }
    // A certificate that the unit doesn't name isn't renewed, but noticed.
    steps.push(run("hexz-nbd pki client other.example.org --days 3"));
    let last = commands.last().unwrap();
    steps.push(Step::Run(page::Command { code: 3, ..page::command(0, last.clone()) }));
    machine::run("hexz-nbd-renew.service", &steps);
}

/// Returns the commands of a unit, with the program that is tested.
fn exec_start(unit: &str) -> Vec<String> {
    let unit = unit.replace("\\\n", "");
    let lines = unit.lines().filter_map(|line| line.strip_prefix("ExecStart="));
    lines.map(|line| line.replace("/usr/bin/hexz-nbd", "hexz-nbd")).collect()
}
