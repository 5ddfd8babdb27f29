//! Checks the links of documents as they are packaged, for crates.io and for machines: nothing else
//! is beside them. What a package contains comes from the lists and scripts that build it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use super::machine::in_repository;
use super::{PAGES, truth};

const PROGRAM: &str = env!("CARGO_BIN_EXE_hexz-nbd");

/// Folder of the documents on a machine.
const DOCUMENTS: &str = "usr/share/doc/hexz-nbd";

/// A package, with the text of each page in it that is checked.
struct Package {
    name: String,
    /// Paths in the package.
    files: Vec<PathBuf>,
    /// Pages by their paths in the package.
    pages: BTreeMap<PathBuf, String>,
    /// Folder of the documents. What is outside isn't linked to.
    documents: PathBuf,
}

impl Package {
    /// Creates a package from its files, each with its source.
    fn new(name: &str, documents: &str, files: BTreeMap<PathBuf, PathBuf>) -> Self {
        let is_page = |path: &Path| {
            path.strip_prefix(documents).is_ok_and(|path| {
                path == Path::new("README.md")
                    || path == Path::new("SECURITY.md")
                    || path.starts_with("docs") && path.extension().is_some_and(|it| it == "md")
            })
        };
        let pages = files.iter().filter(|(path, _)| is_page(path));
        Self {
            name: name.to_owned(),
            pages: pages
                .map(|(path, source)| (path.clone(), fs::read_to_string(source).unwrap()))
                .collect(),
            files: files.into_keys().collect(),
            documents: documents.into(),
        }
    }

    /// Returns the relative links that lead nowhere, and the number of all relative links.
    fn broken_links(&self) -> (Vec<String>, usize) {
        let mut broken = Vec::new();
        let mut links = 0;
        for (page, text) in &self.pages {
            for target in truth::targets(text) {
                let path = target.split('#').next().unwrap();
                if path.is_empty() {
                    continue;
                }
                links += 1;
                let found = resolve(page.parent().unwrap(), path).filter(|path| {
                    path.starts_with(&self.documents)
                        && self.files.iter().any(|file| file.starts_with(path))
                });
                if found.is_none() {
                    broken.push(format!("{}: {}: {target}", self.name, page.display()));
                }
            }
        }
        (broken, links)
    }
}

/// Resolves a relative path; `None` if it leaves the package.
fn resolve(folder: &Path, path: &str) -> Option<PathBuf> {
    let mut resolved = folder.to_owned();
    for component in Path::new(path).components() {
        match component {
            Component::ParentDir => resolved.pop().then_some(())?,
            Component::Normal(name) => resolved.push(name),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(resolved)
}

/// Returns the files below a folder, by their paths in it.
fn files_below(folder: &Path) -> BTreeMap<PathBuf, PathBuf> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}")) {
        let path = entry.unwrap().path();
        let name = PathBuf::from(path.file_name().unwrap());
        if path.is_dir() {
            let below = files_below(&path).into_iter();
            files.extend(below.map(|(path, source)| (name.join(path), source)));
        } else {
            files.insert(name, path);
        }
    }
    files
}

/// Returns the files of a list of assets in Cargo.toml, as cargo-deb and cargo-generate-rpm expand
/// it: what a pattern matches keeps its path from the first folder with a wildcard on.
fn assets(list: &toml::Value, prepared: &Path) -> BTreeMap<PathBuf, PathBuf> {
    let mut files = BTreeMap::new();
    for asset in list.as_array().unwrap() {
        let text = |at: usize, key: &str| {
            let value = asset.get(at).or_else(|| asset.get(key));
            value.and_then(toml::Value::as_str).unwrap_or_else(|| panic!("{asset:?}"))
        };
        let (source, destination) = (text(0, "source"), text(1, "dest").trim_start_matches('/'));
        let local = |path: &str| match path.strip_prefix("target/packaging/") {
            Some(path) => prepared.join(path),
            None if path.starts_with("target/") => PathBuf::from(PROGRAM),
            None => PathBuf::from(in_repository(path)),
        };
        let Some((folder, pattern)) = source.split_once('*') else {
            let name = Path::new(source).file_name().unwrap();
            let is_folder = destination.ends_with('/');
            let path = Path::new(destination);
            let path = if is_folder { path.join(name) } else { path.to_owned() };
            let source = local(source);
            assert!(source.is_file(), "{source:?} is missing");
            files.insert(path, source);
            continue;
        };
        assert!(folder.ends_with('/') && destination.ends_with('/'), "{asset:?}");
        let mut matched = files_below(&local(folder));
        if pattern != "*/*" {
            assert!(!pattern.contains(['*', '/']), "{asset:?}: what does this pattern match?");
            matched.retain(|path, _| {
                path.parent() == Some(Path::new("")) && path.to_str().unwrap().ends_with(pattern)
            });
        }
        assert!(!matched.is_empty(), "{asset:?} matches nothing");
        let matched = matched.into_iter();
        files.extend(matched.map(|(path, source)| (Path::new(destination).join(path), source)));
    }
    files
}

/// Runs a script of `packaging`.
fn script(name: &str, arguments: &[&Path]) {
    let mut command = Command::new(in_repository(&format!("packaging/{name}")));
    command.current_dir(in_repository("")).env("CARGO_NET_OFFLINE", "true").args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn links_of_packages_for_machines_resolve() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (prepared, program) = (at("prepared"), Path::new(PROGRAM));
    script("prepare.sh", &[program, &prepared]);
    script("install.sh", &[program, &prepared, &at("root")]);
    script("tarball.sh", &[program, &prepared, &at("archive")]);
    let manifest: toml::Table =
        fs::read_to_string(in_repository("Cargo.toml")).unwrap().parse().unwrap();
    let metadata = &manifest["package"]["metadata"];
    let package =
        |tool: &str| Package::new(tool, DOCUMENTS, assets(&metadata[tool]["assets"], &prepared));
    for package in [
        package("deb"),
        package("generate-rpm"),
        Package::new("install.sh", DOCUMENTS, files_below(&at("root"))),
        Package::new("tarball.sh", "", files_below(&at("archive"))),
    ] {
        for page in PAGES.iter().chain(&["SECURITY.md"]) {
            let path = package.documents.join(page);
            assert!(package.pages.contains_key(&path), "{}: no {path:?}", package.name);
        }
        let (broken, links) = package.broken_links();
        assert!(broken.is_empty(), "{broken:#?}");
        assert!(links > 200, "{}: {links}", package.name);
    }
}

/// Returns what `cargo package` would put into the package in a folder of the repository. Only the
/// program's has pages besides the README.
fn published(folder: &str) -> Package {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--offline", "--manifest-path"]);
    let output = cargo.arg(in_repository(&format!("{folder}Cargo.toml"))).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).unwrap();
    let source = |path: &str| PathBuf::from(in_repository(&format!("{folder}{path}")));
    let files = listed.lines().map(|path| (path.into(), source(path))).collect();
    Package::new(&format!("{folder}Cargo.toml"), "", files)
}

#[test]
fn links_of_published_packages_resolve() {
    let crates = fs::read_dir(in_repository("crates")).unwrap();
    let mut folders: Vec<String> = crates
        .map(|entry| format!("crates/{}/", entry.unwrap().file_name().to_str().unwrap()))
        .collect();
    folders.push(String::new());
    let mut all = 0;
    for folder in folders {
        let package = published(&folder);
        assert!(package.pages.contains_key(Path::new("README.md")), "{folder}: no README.md");
        let (broken, links) = package.broken_links();
        assert!(broken.is_empty(), "{broken:#?}");
        all += links;
    }
    assert!(all > 200, "{all}");
}
