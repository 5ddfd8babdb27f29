//! `tests/security-cases.md` names tests that exist.

use std::path::{Path, PathBuf};

/// Returns the file of a test: `nbd_gateway::access::some_test` is a unit test in
/// `crates/nbd-gateway/src/access.rs`, `src::cli::some_test` one in `src/cli.rs`, and
/// `gateway::access::some_test` one in `tests/integration`.
fn file_of(modules: &[&str]) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = match modules {
        ["src", rest @ ..] => root.join("src").join(rest.join("/")),
        [package, rest @ ..] if package.starts_with("nbd_") || package.starts_with("hexz_") => {
            root.join("crates").join(package.replace('_', "-")).join("src").join(rest.join("/"))
        }
        _ => root.join("tests/integration").join(modules.join("/")),
    };
    [path.with_extension("rs"), path.join("mod.rs"), path.join("lib.rs")]
        .into_iter()
        .find(|file| file.is_file())
}

/// Whether it is run, and not ignored.
fn is_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let heads = [format!("fn {name}()"), format!("async fn {name}()")];
    let at = lines.iter().position(|line| heads.iter().any(|head| line.starts_with(head.as_str())));
    let attributes = |at: usize| lines[..at].iter().rev().take_while(|line| line.starts_with("#["));
    at.is_some_and(|at| {
        let is_test =
            |line: &&&str| line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        attributes(at).any(|line| is_test(&line))
            && !attributes(at).any(|line| line.contains("ignore"))
    })
}

/// The names between backticks that are of tests.
fn names(tests: &str) -> Vec<&str> {
    tests.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect()
}

fn assert_exists(path: &str) {
    let parts: Vec<&str> = path.split("::").collect();
    let (name, modules) = parts.split_last().unwrap();
    let file = file_of(modules).unwrap_or_else(|| panic!("no file for {path}"));
    let source = std::fs::read_to_string(&file).unwrap();
    assert!(is_test(&source, name), "{path} isn't in {}", file.display());
}

#[test]
fn each_threat_has_tests_that_exist() {
    let text = include_str!("../../SECURITY.md");
    let mut rows = 0;
    for row in text.lines().filter(|line| line.starts_with("| ")) {
        let columns: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let tests = names(columns[columns.len() - 1]);
        tests.iter().for_each(|path| assert_exists(path));
        rows += usize::from(!tests.is_empty());
    }
    assert!(rows >= 30, "{rows}");
}

#[test]
fn each_fault_has_tests_that_exist() {
    let table = include_str!("../security-cases.md");
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(rows.len() >= 30, "{}", rows.len());
    for row in rows {
        let columns: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, _, tests] = columns[..] else { panic!("three columns: {row}") };
        let names = names(tests);
        assert!(!names.is_empty(), "no test: {row}");
        names.iter().for_each(|path| assert_exists(path));
    }
}
