//! What the documents tell people: every command is run, page by page, on a machine of its own,
//! and what is shown beside it is compared ([`page`] says how pages mark what they are).

mod examples;
mod machine;
mod page;
mod truth;

use std::collections::BTreeMap;
use std::fs;

use machine::in_repository;
use page::Step;

use crate::support::server::run as run_binary;

/// What no test can run, and in how many blocks of all pages. Who adds some has to say so here.
const NOT_RUN: [(&str, usize); 10] = [
    ("a kernel's command line", 1),
    ("builds the program", 1),
    ("needs FUSE", 1),
    ("needs a kernel with nbd", 1),
    ("needs another machine", 1),
    ("needs qemu-system-x86_64", 3),
    ("needs root", 1),
    ("needs systemd as the first process", 4),
    ("needs vsock", 1),
    ("the test has started it above", 1),
];

/// The pages with commands, by their paths in the repository.
const PAGES: [&str; 16] = [
    "README.md",
    "docs/README.md",
    "docs/as-a-service.md",
    "docs/audit.md",
    "docs/behind-a-load-balancer.md",
    "docs/boot-machines.md",
    "docs/check-archives.md",
    "docs/client-certificates.md",
    "docs/clients.md",
    "docs/incremental-copies.md",
    "docs/metrics.md",
    "docs/monitoring.md",
    "docs/performance.md",
    "docs/serve-many.md",
    "docs/serve-one-snapshot.md",
    "docs/troubleshooting.md",
];

fn source(page: &str) -> String {
    fs::read_to_string(in_repository(page)).unwrap_or_else(|error| panic!("{page}: {error}"))
}

fn run(page: &str) {
    assert!(PAGES.contains(&page), "{page} is none of the pages");
    machine::run(page, &page::steps(&source(page)));
}

#[test]
fn readme() {
    run("README.md");
}

#[test]
fn index() {
    run("docs/README.md");
}

#[test]
fn as_a_service() {
    run("docs/as-a-service.md");
}

#[test]
fn audit() {
    run("docs/audit.md");
}

#[test]
fn behind_a_load_balancer() {
    run("docs/behind-a-load-balancer.md");
}

#[test]
fn boot_machines() {
    run("docs/boot-machines.md");
}

#[test]
fn check_archives() {
    run("docs/check-archives.md");
}

#[test]
fn client_certificates() {
    run("docs/client-certificates.md");
}

#[test]
fn clients() {
    run("docs/clients.md");
}

#[test]
fn incremental_copies() {
    run("docs/incremental-copies.md");
}

#[test]
fn metrics() {
    run("docs/metrics.md");
}

#[test]
fn monitoring() {
    run("docs/monitoring.md");
}

#[test]
fn performance() {
    run("docs/performance.md");
}

#[test]
fn serve_many() {
    run("docs/serve-many.md");
}

#[test]
fn serve_one_snapshot() {
    run("docs/serve-one-snapshot.md");
}

#[test]
fn troubleshooting() {
    run("docs/troubleshooting.md");
}

/// The examples of --help are a page, too, but one without comments.
#[test]
fn help() {
    // What the examples take for granted.
    const BEFORE: &str = "\
<!-- prepare: hexz-nbd pki --dir given init && hexz-nbd pki --dir given server server.example.org
cp given/servers/*/*.pem given/crl.pem .
mkdir -p /etc/pki/libnbd && cp ca-cert.pem /etc/pki/libnbd
sed '/^hours/d; s,uri:spiffe://corp/backup/,dns:backup.,; s,web-,,' examples/rules.toml > rules.toml
cp examples/one-snapshot.toml hexz-nbd.toml && cp disk.hexz /srv/hexz-nbd -->
";
    const RULES: &str = "  Serve many:";
    const DOCTOR: &str = "  Find out why";
    const CHANGED: &str = "CHANGED BLOCKS";
    let mut text = run_binary(["--help"]).stdout;
    let from = text.find("EXAMPLES\n").unwrap();
    let to = text.find("CONFIGURATION FILE\n").unwrap();
    text = text[from..to].to_owned();
    for (before, server) in [
        (RULES, ""),
        (
            DOCTOR,
            "hexz-nbd --tls-cert server-cert.pem --tls-key server-key.pem \
                  --allow 10.0.0.0/8 snap.hexz",
        ),
        (CHANGED, "hexz-nbd monday.hexz tuesday.hexz"),
    ] {
        assert_eq!(text.matches(before).count(), 1, "{before}");
        if !server.is_empty() {
            text = text.replace(before, &format!("<!-- prepare: {server} -->\n{before}"));
        }
    }
    // Headings have commands just below.
    let lines = text.lines().map(|line| match line.starts_with("  ") && !line.starts_with("   ") {
        true => format!("{line}\n\n"),
        false => format!("{line}\n"),
    });
    machine::run("--help", &page::steps(&(BEFORE.to_owned() + &lines.collect::<String>())));
}

#[test]
fn every_page_is_run() {
    let mut pages: Vec<String> = fs::read_dir(in_repository("docs"))
        .unwrap()
        .map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()))
        .filter(|name| name.ends_with(".md"))
        .collect();
    pages.push("README.md".to_owned());
    pages.sort();
    let mut expected = PAGES.map(str::to_owned);
    expected.sort();
    assert_eq!(pages, expected);
    let own = include_str!("mod.rs");
    for page in PAGES {
        assert!(own.contains(&format!("    run(\"{page}\");")), "{page} has no test");
    }
}

#[test]
fn what_is_not_run_is_known() {
    let mut reasons = BTreeMap::new();
    for page in PAGES {
        for step in page::steps(&source(page)) {
            if let Step::NotRun { line, why } = step {
                println!("{page}:{line}: not run: {why}");
                *reasons.entry(why).or_insert(0) += 1;
            }
        }
    }
    let expected = NOT_RUN.map(|(why, times)| (why.to_owned(), times));
    assert_eq!(reasons, BTreeMap::from(expected));
}
