//! Clients on other machines, as far as network namespaces make them.

use std::process::Command;

use super::run_command;
use crate::support::archive;

#[test]
fn only_the_allowed_network_comes_in() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/integration/clients/namespaces.sh");
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--net", "--mount", "sh", script])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("BINARY", env!("CARGO_BIN_EXE_hexz-nbd"))
        .env("ARCHIVE", archive("base-zstd.hxz"));
    let said = run_command(command).ok();
    assert_eq!(
        said,
        "allowed: 8388608\nstranger: refused\nbytes: 0\nrefused in the log: 2\nended: 0\n"
    );
}
