//! Adds the commit to the version if the program is built from a checkout.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let version = env!("CARGO_PKG_VERSION");
    let version = match commit(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_owned(),
    };
    println!("cargo::rustc-env=HEXZ_NBD_VERSION={version}");
}

/// Returns the abbreviated commit of a checkout; `None` in a source archive, or without git.
fn commit(folder: &Path) -> Option<String> {
    // Without this, git would find a repository that the unpacked archive merely lies in.
    if !folder.join(".git").exists() {
        return None;
    }
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        // A hook of git sets these, perhaps for another repository.
        command.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").current_dir(folder);
        let output = command.args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    // HEAD changes when another branch is checked out. A commit changes the branch, and the log
    // of HEAD, which also shows commits to a branch that is packed now.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "logs/HEAD"].into_iter().chain(branch.as_deref()) {
        if let Some(path) = git(&["rev-parse", "--git-path", name])
            && folder.join(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    Some(commit)
}
