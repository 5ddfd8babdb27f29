//! Checks the links of READMEs as they are packaged for crates.io, where nothing else is beside them.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use super::machine::in_repository;

/// Packages that are published, by their folders.
const PACKAGES: [(&str, &str); 8] = [
    ("hexz-nbd", "."),
    ("hexz-exports", "crates/hexz-exports"),
    ("hexz-reader", "crates/hexz-reader"),
    ("nbd-gateway", "crates/nbd-gateway"),
    ("nbd-sandbox", "crates/nbd-sandbox"),
    ("nbd-server", "crates/nbd-server"),
    ("nbd-telemetry", "crates/nbd-telemetry"),
    ("object-reader", "crates/object-reader"),
];

/// Returns the files that a package contains.
fn packaged_files(package: &str) -> Vec<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--offline", "--package", package]);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Returns the targets of links and pictures.
fn targets(page: &str) -> Vec<&str> {
    let inline = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let referenced = page.lines().filter_map(|line| {
        let (name, target) = line.split_once("]: ")?;
        name.starts_with('[').then_some(target)
    });
    let attributes = ["src=\"", "srcset=\"", "href=\""].into_iter().flat_map(|attribute| {
        page.split(attribute).skip(1).filter_map(|rest| rest.split('"').next())
    });
    inline.chain(referenced).chain(attributes).collect()
}

#[test]
fn links_of_packaged_readmes_resolve() {
    let mut broken = BTreeMap::new();
    let mut relative = 0;
    for (package, folder) in PACKAGES {
        let files = packaged_files(package);
        assert!(files.iter().any(|file| file == "README.md"), "{package}: {files:?}");
        let page = fs::read_to_string(in_repository(&format!("{folder}/README.md"))).unwrap();
        for target in targets(&page) {
            if target.starts_with("https://") || target.starts_with('#') {
                continue;
            }
            relative += 1;
            let path = target.split('#').next().unwrap().trim_end_matches('/');
            let is_there = |file: &String| {
                file.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            if !files.iter().any(is_there) {
                broken.entry(package).or_insert_with(Vec::new).push(target.to_owned());
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(relative > 20, "{relative}");
}
