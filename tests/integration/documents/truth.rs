//! Checks the other facts in the pages: links, options, targets of make, messages.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::page::{COMMANDS, Command, Step, steps};
use super::{PAGES, in_repository, source};
use crate::support::server::run as run_binary;

/// Pages without commands, whose links are checked.
const OTHERS: [&str; 6] = [
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "certs/README.md",
    "tests/security-cases.md",
    "tests/security-guarantees.md",
];

/// Pages that are organized by messages.
const MESSAGES: [&str; 3] =
    ["docs/behind-a-load-balancer.md", "docs/incremental-copies.md", "docs/troubleshooting.md"];

/// Returns the texts between backticks, outside blocks.
fn quoted(page: &str) -> Vec<String> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in page.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if !inside && !line.starts_with("    ") {
            found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

/// Returns the anchor that GitHub derives from a heading.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_resolve() {
    let mut links = 0;
    for page in PAGES.iter().chain(&OTHERS).filter(|page| page.ends_with(".md")) {
        let text = source(page);
        for target in targets(&text) {
            let (path, to) = target.split_once('#').unwrap_or((target, ""));
            let folder = Path::new(page).parent().unwrap();
            let path = match path {
                "" => Path::new(page).to_owned(),
                path => folder.join(path),
            };
            let path = in_repository(path.to_str().unwrap());
            assert!(Path::new(&path).exists(), "{page}: {target}");
            if !to.is_empty() {
                let text = fs::read_to_string(&path).unwrap();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                assert!(headings.any(|line| anchor(line) == to), "{page}: {target}");
            }
            links += 1;
        }
    }
    assert!(links > 50, "{links}");
}

/// Packages are published with their READMEs, which must not link to files that stay behind.
#[test]
fn readmes_link_to_what_is_packaged() {
    let crates = fs::read_dir(in_repository("crates")).unwrap();
    let mut folders: Vec<String> = crates
        .map(|entry| format!("crates/{}/", entry.unwrap().file_name().to_str().unwrap()))
        .collect();
    folders.push(String::new());
    for folder in folders {
        let listed = std::process::Command::new(env!("CARGO"))
            .args(["package", "--list", "--allow-dirty", "--offline", "--manifest-path"])
            .arg(in_repository(&format!("{folder}Cargo.toml")))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&listed.stderr);
        assert!(listed.status.success(), "{folder}: {said}");
        let listed = String::from_utf8(listed.stdout).unwrap();
        for target in targets(&source(&format!("{folder}README.md"))) {
            let path = target.split('#').next().unwrap().trim_end_matches('/');
            let below = format!("{path}/");
            let is_packaged = |file: &str| file == path || file.starts_with(&below);
            assert!(
                path.is_empty() || listed.lines().any(is_packaged),
                "{folder}README.md: {path}"
            );
        }
    }
}

/// Returns the targets of links that are relative.
fn targets(page: &str) -> impl Iterator<Item = &str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| !target.starts_with("https://"))
}

/// Programs of clients and others that pages use, with Debian's packages that contain them.
const PROGRAMS: [(&str, &str); 23] = [
    ("certbot", "certbot"),
    ("curl", "curl"),
    ("debugfs", "e2fsprogs"),
    ("examples/incremental-copy.py", "python3-libnbd"),
    ("fusermount3", "fuse3"),
    ("guestfish", "guestfish"),
    ("haproxy", "haproxy"),
    ("jq", "jq"),
    ("mke2fs", "e2fsprogs"),
    ("nbd-client", "nbd-client"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("nbdsh", "python3-libnbd"),
    ("nginx", "nginx"),
    ("promtool", "prometheus"),
    ("python3 -m venv", "python3-venv"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("sfdisk", "fdisk"),
];

/// Packages for building.
const FOR_BUILDING: [&str; 5] =
    ["build-essential", "buildah", "gcc-aarch64-linux-gnu", "musl-dev:arm64", "musl-tools"];

#[test]
fn pages_name_the_packages_of_their_programs() {
    let mut seen = 0;
    for page in PAGES {
        let text = source(page);
        let lists = text.split("apt install ").skip(1);
        let lists = lists.map(|rest| rest.split(['\n', '`']).next().unwrap());
        let named: BTreeSet<&str> = lists.flat_map(str::split_ascii_whitespace).collect();
        for package in &named {
            let known = FOR_BUILDING.contains(package)
                || package.starts_with("./")
                || PROGRAMS.iter().any(|(_, of_program)| of_program == package);
            assert!(known, "{page}: nothing on the pages comes with {package}");
        }
        for step in steps(&text) {
            let (Step::Run(Command { text: commands, .. }) | Step::NotRun { text: commands, .. }) =
                step
            else {
                continue;
            };
            for (program, package) in PROGRAMS {
                let uses = |line: &str| {
                    let line = line.trim_start_matches("/sbin/");
                    line.starts_with(&format!("{program} "))
                };
                if commands.split(['\n', '|', ';']).any(|line| uses(line.trim_start())) {
                    assert!(named.contains(package), "{page}: {program} comes with {package}");
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 50, "{seen}");
}

/// Pages use names in whose place readers put their own.
#[test]
fn pages_link_to_the_conventions() {
    for page in PAGES {
        let text = source(page);
        let runs = steps(&text).iter().any(|step| matches!(step, Step::Run(_)));
        let links = text.contains("README.md#conventions") || text.contains("## Conventions");
        assert!(links || !runs, "{page} doesn't link to the conventions");
    }
}

#[test]
fn options_and_targets_exist() {
    let help = |words: &[&str]| run_binary(words.iter().copied().chain(["--help"])).stdout;
    let of_pki = ["init", "server", "client", "renew", "show", "revoke"];
    let mut known = help(&[]) + &help(&["demo"]);
    COMMANDS.iter().for_each(|command| known += &help(&[command]));
    of_pki.iter().for_each(|command| known += &help(&["pki", command]));
    let words = |text: &str| {
        let is_end = |c: char| !c.is_ascii_alphanumeric() && c != '-';
        text.split(is_end).filter(|w| w.starts_with("--")).map(str::to_owned).collect::<Vec<_>>()
    };
    let known: BTreeSet<String> = words(&known).into_iter().collect();
    // Options of other programs.
    let others = ["--path", "--list", "--requests", "--outage", "--redraw", "--output"];
    let makefile = source("Makefile");
    // A rule may have several targets.
    let rules = makefile.lines().filter_map(|line| line.split_once(':'));
    let targets: BTreeSet<&str> = rules.flat_map(|(names, _)| names.split(' ')).collect();
    let mut seen = 0;
    for page in PAGES.iter().chain(&OTHERS).filter(|page| page.ends_with(".md")) {
        for said in quoted(&source(page)) {
            let ours = said.starts_with("--") || said.starts_with("hexz-nbd ");
            for option in words(&said).into_iter().filter(|_| ours) {
                let exists = known.contains(&option) || others.contains(&option.as_str());
                assert!(exists, "{page}: there is no {option}");
                seen += 1;
            }
            if let Some(target) = said.strip_prefix("make ") {
                let target = target.split(' ').next().unwrap();
                assert!(targets.contains(target), "{page}: make {target}");
                seen += 1;
            }
        }
    }
    assert!(seen > 50, "{seen}");
}

/// Messages in headings and at the beginning of list items must appear in an output that the page
/// shows, or in the source, apart from their variable parts.
#[test]
fn messages_are_those_of_the_program() {
    let program = all_source(Path::new(&in_repository("src")))
        + &all_source(Path::new(&in_repository("crates")))
        + &source("examples/incremental-copy.py");
    let mut seen = 0;
    for page in MESSAGES {
        let text = source(page);
        let all = steps(&text);
        let shown: Vec<&String> = all.iter().flat_map(shown_by).collect();
        // A colon is often followed by another message.
        let is_known = |said: &str| {
            let mut parts = said.split(['…', ':']).map(str::trim).filter(|part| part.len() > 2);
            parts.all(|part| program.contains(part) || shown.iter().any(|line| line.contains(part)))
        };
        let says = |line: &&str| line.starts_with("### `") || line.starts_with("- `");
        for line in text.lines().filter(says) {
            let only_first = if line.starts_with('-') { 1 } else { usize::MAX };
            for message in line.split('`').skip(1).step_by(2).take(only_first) {
                assert!(is_known(message), "{page}: nothing says: {message}");
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "{seen}");
}

/// Labels of the program's own log lines and errors, which log monitors look for.
#[test]
fn labels_are_listed() {
    let mut code = source("src/exit_status.rs") + &source("crates/hexz-exports/src/catalog.rs");
    code += &source("crates/object-reader/src/disk_cache/error.rs");
    for folder in ["src/service", "src/settings", "src/monitor", "src/log"] {
        code += &all_source(Path::new(&in_repository(folder)));
    }
    let is_label = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let in_lines = code.split("reason = \"").skip(1);
    let in_lines = in_lines.chain(code.split("(\"reason\", \"").skip(1));
    let in_lines = in_lines.chain(code.split("label: \"").skip(1));
    let mut labels: BTreeSet<String> =
        in_lines.filter_map(|rest| Some(rest.split('"').next()?.to_owned())).collect();
    let tables = code.split("fixed_exit_status! {").skip(1).filter_map(|it| it.split('}').next());
    labels.extend(tables.flat_map(|it| it.split('"').skip(1).step_by(2)).map(str::to_owned));
    for function in code.split("fn label(").skip(1) {
        let body = function.split("\n    }\n").next().unwrap();
        labels.extend(body.split('"').skip(1).step_by(2).map(str::to_owned));
    }
    let fetching = all_source(Path::new(&in_repository("crates/object-reader/src")));
    let in_lines = fetching.split("reason = \"").skip(1);
    let in_lines = in_lines.filter_map(|rest| Some(rest.split('"').next()?.to_owned()));
    // Lints are allowed with a sentence.
    labels.extend(in_lines.filter(|label| is_label(label)));
    assert!(labels.len() > 50 && labels.iter().all(|label| is_label(label)), "{labels:?}");

    let page = source("docs/troubleshooting.md");
    let table = page.split("## Labels of the program's log lines").nth(1).unwrap();
    let rows = table.split("\n## ").next().unwrap().lines().filter_map(|it| it.strip_prefix("| `"));
    let names = rows.flat_map(|row| row.split(" |").next().unwrap().split("`, `"));
    let listed: BTreeSet<String> = names.map(|name| name.trim_matches('`').to_owned()).collect();
    let listed: BTreeSet<String> = listed.into_iter().filter(|name| name != "reason").collect();
    assert_eq!(listed, labels);
}

/// Results of requests to stores, and failures of reads from them.
#[test]
fn labels_of_stores_are_listed() {
    let page = source("docs/metrics.md");
    let results = source("crates/object-reader/src/store.rs");
    let results =
        results.split("fn label(self)").nth(1).unwrap().split("\n    }\n").next().unwrap();
    let mut labels: BTreeSet<&str> = results.split('"').skip(1).step_by(2).collect();
    assert!(labels.len() > 10, "{labels:?}");
    let failures = source("crates/hexz-reader/src/remote.rs");
    let failures = failures.split("fn read_error(").nth(1).unwrap();
    let found: Vec<&str> = failures.split(", \"").skip(1).collect();
    labels.extend(found.iter().filter_map(|rest| rest.split('"').next()));
    assert!(labels.contains("store_down") && labels.contains("shutting_down"), "{labels:?}");
    for label in labels {
        assert!(page.contains(&format!("`{label}`")), "{label}");
    }
}

/// Labels that the libraries give to refusals, failures and notes.
#[test]
fn labels_of_the_libraries_are_listed() {
    let mut labels = BTreeSet::new();
    for folder in ["crates/nbd-gateway/src", "crates/nbd-sandbox/src", "crates/nbd-server/src"] {
        let code = all_source(Path::new(&in_repository(folder)));
        let quoted = |text: &str| text.split('"').nth(1).unwrap_or_default().to_owned();
        labels.extend(code.split("Note::new(\"").skip(1).map(|rest| quoted(&format!("\"{rest}"))));
        for function in code.split("fn label(").skip(1) {
            let arms = function.split("\n    }\n").next().unwrap().split("=> \"").skip(1);
            labels.extend(arms.map(|rest| quoted(&format!("\"{rest}"))));
        }
    }
    assert!(labels.len() > 90, "{labels:?}");
    // Health checks are logged at debug level, and the engine is never without a deadline here.
    for unlisted in ["closed_at_once", "connection_lost", "default", "negotiation_timeout"] {
        assert!(labels.remove(unlisted), "{unlisted}");
    }
    labels.remove("allowed_by_rule");
    let page = source("docs/troubleshooting.md");
    let missing: Vec<_> =
        labels.iter().filter(|label| !page.contains(&format!("`{label}`"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Returns the lines of a step that are compared with output when the page is run.
fn shown_by(step: &Step) -> &[String] {
    match step {
        Step::Run(Command { prints: Some(lines), .. }) | Step::Log { wanted: lines, .. } => lines,
        _ => &[],
    }
}

/// Returns all source of a folder, with string literals that span several lines joined.
fn all_source(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.push_str(&all_source(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let mut pieces = text.split("\\\n");
            all.push_str(pieces.next().unwrap());
            pieces.for_each(|piece| all.push_str(piece.trim_start()));
        }
    }
    all.replace("\\\"", "\"")
}
