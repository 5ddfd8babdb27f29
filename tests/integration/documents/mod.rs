//! Runs every command in the documents, page by page, each page in its own namespaces, and compares
//! the output that pages show. [`page`] describes how pages are marked up.

mod examples;
mod machine;
mod packaged;
mod page;
mod stores;
mod truth;

use std::collections::BTreeMap;
use std::fs;

use machine::in_repository;
use page::Step;

use crate::support::server::run as run_binary;

/// Reasons for blocks that no test can run, each with the number of such blocks on all pages.
const NOT_RUN: [(&str, usize); 21] = [
    ("a kernel's command line", 2),
    ("builds the Hexz tools", 1),
    ("builds the program", 8),
    ("installs Rust", 3),
    ("needs Ansible", 1),
    ("needs Proxmox VE", 1),
    ("needs a Kubernetes cluster", 4),
    ("needs a container engine", 2),
    ("needs a kernel with nbd", 5),
    ("needs a machine that boots", 1),
    ("needs an ACME server", 1),
    ("needs another machine", 5),
    ("needs libguestfs", 1),
    ("needs libvirt", 2),
    ("needs qemu-system-x86_64", 6),
    ("needs root", 2),
    ("needs step-ca", 1),
    ("needs systemd as the first process", 8),
    ("needs the Hexz tools", 3),
    ("needs the files of a release", 4),
    ("needs vsock", 1),
];

/// The pages with commands, by their paths in the repository.
const PAGES: [&str; 28] = [
    "README.md",
    "docs/README.md",
    "docs/as-a-service.md",
    "docs/audit.md",
    "docs/behind-a-load-balancer.md",
    "docs/boot-machines.md",
    "docs/certificate-renewal.md",
    "docs/check-archives.md",
    "docs/client-certificates.md",
    "docs/clients.md",
    "docs/create-snapshots.md",
    "docs/examine-disks.md",
    "docs/fleet.md",
    "docs/http-stores.md",
    "docs/incremental-copies.md",
    "docs/install.md",
    "docs/kubernetes.md",
    "docs/metrics.md",
    "docs/monitoring.md",
    "docs/object-stores.md",
    "docs/packages.md",
    "docs/performance.md",
    "docs/restore-files.md",
    "docs/restore-machines.md",
    "docs/serve-many.md",
    "docs/serve-one-snapshot.md",
    "docs/threat-model.md",
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
fn certificate_renewal() {
    run("docs/certificate-renewal.md");
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
fn create_snapshots() {
    run("docs/create-snapshots.md");
}

#[test]
fn examine_disks() {
    run("docs/examine-disks.md");
}

#[test]
fn fleet() {
    run("docs/fleet.md");
}

#[test]
fn http_stores() {
    run("docs/http-stores.md");
}

#[test]
fn incremental_copies() {
    run("docs/incremental-copies.md");
}

#[test]
fn install() {
    run("docs/install.md");
}

#[test]
fn kubernetes() {
    run("docs/kubernetes.md");
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
fn object_stores() {
    run("docs/object-stores.md");
}

#[test]
fn packages() {
    run("docs/packages.md");
}

#[test]
fn performance() {
    run("docs/performance.md");
}

#[test]
fn restore_files() {
    run("docs/restore-files.md");
}

#[test]
fn restore_machines() {
    run("docs/restore-machines.md");
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
fn threat_model() {
    run("docs/threat-model.md");
}

#[test]
fn troubleshooting() {
    run("docs/troubleshooting.md");
}

/// The examples of --help are run like a page. They assume some files, and aren't a sequence.
#[test]
fn help() {
    let before = [
        "hexz-nbd pki --dir given init && hexz-nbd pki --dir given server server.example.org",
        "cp given/servers/*/*.pem given/crl.pem .",
        "mkdir -p /etc/pki/libnbd && cp ca-cert.pem /etc/pki/libnbd",
        "sed '/^hours/d; s,uri:spiffe://corp/backup/,dns:backup.,; s,web-,,' examples/rules.toml \
         > rules.toml",
        "cp examples/one-snapshot.toml hexz-nbd.toml",
        "mkdir /srv/hexz-nbd && cp disk.hexz /srv/hexz-nbd",
    ];
    let mut text = examples(&[]);
    // The server of one example isn't that of the next.
    let over_tls = "hexz-nbd --tls-cert server-cert.pem --tls-key server-key.pem \
                    --allow 10.0.0.0/8 snap.hexz";
    for (heading, server) in
        [("  Find out why", over_tls), ("CHANGED BLOCKS", "hexz-nbd monday.hexz tuesday.hexz")]
    {
        assert_eq!(text.matches(heading).count(), 1, "{heading}");
        text = text.replace(heading, &format!("    {server}\n\n{heading}"));
    }
    run_examples("--help", &before, &text);
}

#[test]
fn help_of_commands() {
    let folders = "cd ~ && mkdir -p .local/share/bash-completion/completions \
                   .config/fish/completions .zfunc";
    for (command, before) in [("pki", [].as_slice()), ("completions", &[folders])] {
        run_examples(command, before, &examples(&[command]));
    }
}

/// Runs the examples of a help text, after the commands `before` them.
fn run_examples(name: &str, before: &[&str], text: &str) {
    let mut steps: Vec<Step> =
        before.iter().map(|&text| Step::Run(page::command(0, text.to_owned()))).collect();
    steps.extend(page::steps_of_examples(text));
    machine::run(name, &steps);
}

/// Returns the examples of a command's help, marked up like a page.
fn examples(command: &[&str]) -> String {
    let help = run_binary(command.iter().copied().chain(["--help"])).stdout;
    let from = help.find("\nEXAMPLE").unwrap_or_else(|| panic!("{command:?} has no examples"));
    let text = help[from..].trim_start();
    let text = text.find("CONFIGURATION FILE\n").map_or(text, |end| &text[..end]);
    let lines = text.lines().map(|line| match line.starts_with("    ") {
        true => format!("{line}\n"),
        // Headings have commands just below.
        false => format!("{line}\n\n"),
    });
    lines.collect()
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
fn blocks_not_run_have_listed_reasons() {
    let mut reasons = BTreeMap::new();
    for page in PAGES {
        for step in page::steps(&source(page)) {
            if let Step::NotRun { line, why, .. } = step {
                println!("{page}:{line}: not run: {why}");
                *reasons.entry(why).or_insert(0) += 1;
            }
        }
    }
    let expected = NOT_RUN.map(|(why, times)| (why.to_owned(), times));
    assert_eq!(reasons, BTreeMap::from(expected));
}
