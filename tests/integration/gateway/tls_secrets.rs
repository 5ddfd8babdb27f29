//! Keys and passwords that others could read by their permissions, where container runtimes put
//! them and elsewhere.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{BASE, plain};
use crate::support::archive;
use crate::support::pki::Pki;

fn set(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Puts a key where others can read it as far as its own mode says, but can't come to.
#[test]
fn a_key_behind_a_closed_folder_is_taken() {
    let pki = Pki::new();
    set(&pki.server_key(), 0o644);
    set(pki.folder(), 0o700);
    let server = plain().tls(pki).start();
    server.assert_alive();
    // At a reload as well, in the sandbox.
    server.signal("HUP");
    server.wait_for_reloads(1);
    set(server.pki().folder(), 0o755);
    server.signal("HUP");
    server.wait_for_reason("reload_failed");
    server.assert_alive();
}

#[test]
fn the_advice_suits_containers_too() {
    let (code, error) = plain().tls(Pki::new().with_exposed_key()).fail();
    assert_eq!(code, 4);
    for part in ["(mode 0644)", "chmod 600 ", "defaultMode: 0400", "mode=0400"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn passwords_are_judged_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("password");
    fs::write(&path, "hunter2").unwrap();
    let code = |folder_mode| {
        set(&path, 0o444);
        set(folder.path(), folder_mode);
        plain().arg("--password-file").arg(&path).arg("--check-config").run().code
    };
    assert_eq!(code(0o755), Some(3));
    assert_eq!(code(0o700), Some(0));
}

/// The exit code of `--check-config` with a key as Kubernetes mounts it (reached by symbolic
/// links, mode 0644), in new namespaces.
fn mounted(namespaces: &[&str], options: &str) -> Option<i32> {
    let pki = Pki::new();
    set(pki.folder(), 0o755);
    // The key is in the archive of the folder that is mounted.
    let volume = pki.folder().join("volume");
    let mount_point = pki.folder().join("secret");
    fs::create_dir(&volume).unwrap();
    fs::create_dir(&mount_point).unwrap();
    let version = volume.join("..2026_11_29");
    fs::create_dir(&version).unwrap();
    for (from, name) in [(pki.server_cert(), "tls.crt"), (pki.server_key(), "tls.key")] {
        fs::copy(from, version.join(name)).unwrap();
        set(&version.join(name), 0o644);
        symlink(format!("..data/{name}"), volume.join(name)).unwrap();
    }
    symlink("..2026_11_29", volume.join("..data")).unwrap();
    let script = format!(
        "mount -t tmpfs -o mode=1777 tmpfs \"$1\" && cp -a \"$2\"/. \"$1\" && \
         mount -o remount,bind,{options} \"$1\" || exit 99
         exec \"$3\" --check-config --tls-cert \"$1/tls.crt\" --tls-key \"$1/tls.key\" \"$4\""
    );
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount"]).args(namespaces);
    command.args(["sh", "-c", &script, "sh"]).args([&mount_point, &volume]);
    command.arg(env!("CARGO_BIN_EXE_hexz-nbd")).arg(archive(BASE));
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
    let output = command.output().unwrap();
    let code = output.status.code();
    assert_ne!(code, Some(99), "{}", String::from_utf8_lossy(&output.stderr));
    code
}

#[test]
fn a_secret_that_a_container_runtime_mounted_is_taken() {
    let container = ["--pid", "--fork", "--mount-proc"];
    assert_eq!(mounted(&container, "ro"), Some(0));
    // Whoever can write there could have put it there.
    assert_eq!(mounted(&container, "rw"), Some(4));
    // Without a PID namespace of its own the users of the machine are there.
    let first = fs::read_link("/proc/self/ns/pid").unwrap();
    let is_in_container = first != Path::new("pid:[4026531836]");
    assert_eq!(mounted(&[], "ro"), Some(if is_in_container { 0 } else { 4 }));
}
