//! Checks that every guarantee of `docs/threat-model.md` is summarized in `SECURITY.md` and mapped to
//! tests in `security-guarantees.md`, and that the tests named there and in `security-cases.md`
//! exist and are run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const SUMMARY: &str = include_str!("../../SECURITY.md");
const THREATS: &str = include_str!("../../docs/threat-model.md");
const GUARANTEES: &str = include_str!("../security-guarantees.md");
const CASES: &str = include_str!("../security-cases.md");

/// Returns the file of a test, given the modules of its path:
///
/// - `nbd_gateway::access`: `crates/nbd-gateway/src/access.rs`, unit tests of a package
/// - `nbd_server::tests::draining`: `crates/nbd-server/tests/draining.rs`, tests of a package
/// - `src::cli`: `src/cli.rs`, unit tests of the program
/// - `gateway::access`: `tests/integration/gateway/access.rs`, tests that run the program
fn file_of(modules: &[&str]) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package_folder = |package: &str| root.join("crates").join(package.replace('_', "-"));
    let is_package =
        |name: &str| ["nbd_", "hexz_", "object_"].iter().any(|it| name.starts_with(it));
    let path = match modules {
        ["src", rest @ ..] => root.join("src").join(rest.join("/")),
        [package, "tests", rest @ ..] if is_package(package) => {
            package_folder(package).join("tests").join(rest.join("/"))
        }
        [package, rest @ ..] if is_package(package) => {
            package_folder(package).join("src").join(rest.join("/"))
        }
        _ => root.join("tests/integration").join(modules.join("/")),
    };
    let files = [path.with_extension("rs"), path.join("mod.rs"), path.join("lib.rs")];
    files.into_iter().find(|file| file.is_file())
}

/// Returns true if `source` has a test of that name that isn't ignored.
fn has_test(source: &str, name: &str) -> bool {
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

/// Checks everything between backticks in a column of tests: paths of tests, folders, and targets
/// of make. Returns the number of test functions and folders of tests.
fn check_tests(column: &str) -> usize {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let makefile = include_str!("../../Makefile");
    let mut tests = 0;
    for name in column.split('`').skip(1).step_by(2) {
        if let Some(target) = name.strip_prefix("make ") {
            assert!(makefile.contains(&format!("\n{target}:")), "no target of make: {name}");
        } else if let Some((modules, function)) = name.rsplit_once("::") {
            let modules: Vec<&str> = modules.split("::").collect();
            let file = file_of(&modules).unwrap_or_else(|| panic!("no file for {name}"));
            let source = std::fs::read_to_string(&file).unwrap();
            assert!(has_test(&source, function), "{name} isn't in {}", file.display());
            tests += 1;
        } else {
            assert!(root.join(name).is_dir(), "neither a test nor a folder of tests: {name}");
            tests += 1;
        }
    }
    tests
}

fn columns(row: &str) -> Vec<&str> {
    let row = row.strip_prefix("| ").and_then(|row| row.strip_suffix(" |"));
    row.map(|row| row.split(" | ").collect()).unwrap_or_default()
}

/// Returns true for ids such as `NET-1`.
fn is_id(text: &str) -> bool {
    text.split_once('-').is_some_and(|(section, number)| {
        section.len() == 3
            && section.chars().all(|c| c.is_ascii_uppercase())
            && number.parse::<u32>().is_ok()
    })
}

/// Returns the rows of `page` that begin with an id, as columns.
fn guarantees(page: &str) -> Vec<Vec<&str>> {
    let rows = page.lines().map(columns);
    rows.filter(|columns| columns.first().is_some_and(|id| is_id(id))).collect()
}

#[test]
fn every_guarantee_has_tests_that_exist() {
    let ids = |page| {
        let mut ids = BTreeSet::new();
        for row in guarantees(page) {
            assert_eq!(row.len(), 3, "{row:?}");
            assert!(ids.insert(row[0]), "{} is used twice", row[0]);
        }
        ids
    };
    let (promised, shown) = (ids(THREATS), ids(GUARANTEES));
    assert!(promised.len() >= 70, "{}", promised.len());
    assert_eq!(promised, shown);
    for row in guarantees(GUARANTEES) {
        assert!(check_tests(row[2]) > 0, "no test: {row:?}");
    }
}

/// Returns the ids that `page` mentions, including those of ranges such as `NET-1 to NET-7`.
fn mentioned_ids(page: &str) -> Vec<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let words: Vec<&str> =
        page.split_whitespace().map(|word| word.trim_matches(|c| !is_part(c))).collect();
    let number = |id: &str| id.split_once('-').unwrap().1.parse::<u32>().unwrap();
    // CRC-32 is a checksum.
    let is_mention = |word: &str| is_id(word) && word != "CRC-32";
    let mut ids = Vec::new();
    for (at, word) in words.iter().enumerate().filter(|(_, word)| is_mention(word)) {
        let range_start = match words[..at] {
            [.., start, "to"] if is_id(start) => number(start) + 1,
            _ => number(word),
        };
        let section = word.split_once('-').unwrap().0;
        ids.extend((range_start..=number(word)).map(|number| format!("{section}-{number}")));
    }
    ids
}

#[test]
fn every_guarantee_is_summarized_once() {
    let mut summarized = mentioned_ids(SUMMARY);
    let mut ids: Vec<&str> = guarantees(THREATS).iter().map(|row| row[0]).collect();
    summarized.sort();
    ids.sort();
    assert_eq!(summarized, ids);
}

#[test]
fn every_row_of_a_table_of_guarantees_has_an_id() {
    // A row without an id would be a guarantee that nothing checks.
    for page in [THREATS, GUARANTEES] {
        let mut is_of_guarantees = false;
        for line in page.lines() {
            let columns = columns(line);
            match columns.first() {
                None => is_of_guarantees = false,
                Some(&"id") => is_of_guarantees = true,
                Some(&"---") => {}
                Some(id) => assert!(!is_of_guarantees || is_id(id), "no id: {line}"),
            }
        }
    }
}

#[test]
fn every_case_has_tests_that_exist() {
    let rows: Vec<&str> = CASES.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(rows.len() >= 30, "{}", rows.len());
    for row in rows {
        let columns = columns(row);
        let [_, _, tests] = columns[..] else { panic!("three columns: {row}") };
        assert!(check_tests(tests) > 0, "no test: {row}");
    }
}
