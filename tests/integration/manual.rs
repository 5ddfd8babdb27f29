//! Manual pages and completions, by what groff, mandoc and bash make of them.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::clients::run;
use crate::support::server::run as run_binary;

/// All pages, in a folder that goes when this is dropped.
struct Manual(TempDir);

impl Manual {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("pages");
        let ended = run_binary(["man", "--dir", dir.to_str().unwrap()]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
        Self(folder)
    }

    fn pages(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.0.path().join("pages")).unwrap();
        let mut pages: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        pages.sort();
        pages
    }

    /// A page as a reader sees it, with everything that is only layout taken away.
    fn read(&self, name: &str) -> String {
        let path = self.0.path().join("pages").join(name);
        let shown = run("mandoc", &["-T", "utf8", path.to_str().unwrap()]).ok();
        // What is bold or underlined is struck twice.
        let mut plain = String::new();
        for character in shown.chars() {
            if character == '\u{8}' {
                plain.pop();
            } else {
                plain.push(character);
            }
        }
        plain.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn no_page_is_warned_of() {
    let manual = Manual::new();
    for page in manual.pages() {
        let page = page.to_str().unwrap();
        for (program, args) in
            [("mandoc", &["-T", "lint", "-W", "warning"][..]), ("groff", &["-man", "-ww", "-z"])]
        {
            let said = run(program, &[args, &[page]].concat());
            assert_eq!(said.everything(), "", "{program} {page}");
            said.ok();
        }
        assert!(fs::read(page).unwrap().is_ascii(), "{page}");
    }
}

#[test]
fn each_command_has_its_page_and_each_option_stands_there() {
    let manual = Manual::new();
    let names: Vec<_> = manual.pages().iter().map(|path| file_name(path)).collect();
    let commands = commands(&run_binary(["--help"]).stdout);
    for command in ["demo", "pki", "verify", "man"] {
        assert!(commands.iter().any(|it| it == command), "{commands:?}");
    }
    let mut expected: Vec<_> = commands.iter().map(|it| format!("hexz-nbd-{it}.1")).collect();
    expected.extend(["hexz-nbd.1".to_owned(), "hexz-nbd.toml.5".to_owned()]);
    expected.sort();
    assert_eq!(names, expected);

    let top = (Vec::new(), "hexz-nbd.1".to_owned());
    let below = commands.iter().map(|it| (vec![it.as_str()], format!("hexz-nbd-{it}.1")));
    for (command, page) in std::iter::once(top).chain(below) {
        let help = run_binary(command.into_iter().chain(["--help"])).stdout;
        let page = manual.read(&page);
        // Values that are explained have a dash and a space before them.
        let options = help.lines().map(str::trim).filter(|line| line.starts_with('-'));
        for option in options.filter(|line| !line.starts_with("- ")) {
            let option = option.replace(['<', '>'], "");
            let option = option.trim_end_matches("...");
            assert!(page.contains(option), "{option:?} isn't in {page}");
        }
    }
    let pki = manual.read("hexz-nbd-pki.1");
    assert!(pki.contains("key-compromise The key is known to others, or may be"), "{pki}");
}

#[test]
fn the_page_of_the_program_has_what_a_reader_looks_for() {
    let manual = Manual::new();
    let page = manual.read("hexz-nbd.1");
    for part in [
        "NAME hexz-nbd - Serves Hexz snapshots read-only over NBD and TLS SYNOPSIS hexz-nbd [OPTIONS]",
        "DESCRIPTION Each snapshot is a disk to clients.",
        "--tls-min VERSION Minimum TLS version. nbd-client 3.24 supports only 1.2 [default: 1.2] \
         1.2 TLS 1.2, with forward-secret AEAD cipher suites only",
        "COMMANDS hexz-nbd-demo(1) Serve a small built-in snapshot",
        "PASSWORDS The password of encrypted archives comes from --password-file,",
        "EXIT STATUS 0 clean shutdown 1 ",
        "SIGNALS SIGHUP ",
        "ENVIRONMENT HEXZ_PASSWORD ",
        "FILES ",
        "EXAMPLES Try it without any setup: hexz-nbd demo Serve ",
        "uri:…",
        concat!("hexz-nbd ", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(page.contains(part), "{part:?} isn't in {page}");
    }
    let printed = run_binary(["man"]).stdout;
    assert_eq!(printed, fs::read_to_string(manual.0.path().join("pages/hexz-nbd.1")).unwrap());
}

#[test]
fn the_page_of_the_file_has_each_key() {
    let page = Manual::new().read("hexz-nbd.toml.5");
    let help = run_binary(["--help"]).stdout;
    let mut keys = 0;
    for line in help.lines() {
        // Such as "  -v, --verbose..." and "      --allow <CIDR>".
        let line = line.trim().trim_start_matches("-v, ");
        let Some(rest) = line.strip_prefix("--") else { continue };
        let key = rest.split([' ', '.']).next().unwrap();
        let only_on_the_command_line = ["config", "check-config", "stdio"].contains(&key);
        assert_ne!(page.contains(&format!(" {key} = ")), only_on_the_command_line, "{key}: {page}");
        keys += 1;
    }
    assert!(keys > 40, "{keys} keys were found in {help}");
    for part in [
        "allow = \"CIDR\" or [\"CIDR\", ...] Peers that may connect: ",
        "max-connections = N Number of clients that are served at the same time [default: 256]",
        "strict = true or false Don't start ",
        "EXPORTS The table [exports] ",
        "RELOAD On SIGHUP",
    ] {
        assert!(page.contains(part), "{part:?} isn't in {page}");
    }
}

#[test]
fn pages_that_can_not_be_written_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("pages");
    fs::create_dir_all(dir.join("hexz-nbd.1")).unwrap();
    let ended = run_binary(["man", "--dir", dir.to_str().unwrap()]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("pages/hexz-nbd.1: "), "{}", ended.stderr);
}

#[test]
fn bash_completes_commands_options_and_values() {
    for (line, expected) in [
        ("hexz-nbd pk", "pki"),
        ("hexz-nbd --tls-client-", "--tls-client-ca --tls-client-crl --tls-client-auth"),
        ("hexz-nbd --tls-client-auth ", "require optional"),
        ("hexz-nbd --sandbox re", "require"),
        ("hexz-nbd pki revoke --reason key", "key-compromise"),
        ("hexz-nbd verify --no-", "--no-progress"),
        ("hexz-nbd completions z", "zsh"),
    ] {
        assert_eq!(completed_by_bash(line), expected, "{line:?}");
    }
}

/// What bash offers at the end of that line, as its completion calls the function.
fn completed_by_bash(line: &str) -> String {
    let script = r#"
        set -u
        . <("$1" completions bash)
        read -ra COMP_WORDS <<< "$2"
        [[ "$2" == *' ' ]] && COMP_WORDS+=('')
        COMP_LINE=$2 COMP_POINT=${#2} COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
        registered=$(complete -p hexz-nbd)
        [[ $registered =~ -F\ ([^ ]+) ]]
        "${BASH_REMATCH[1]}" hexz-nbd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        echo "${COMPREPLY[*]}"
    "#;
    let said = run("bash", &["-c", script, "bash", env!("CARGO_BIN_EXE_hexz-nbd"), line]);
    said.ok().trim().to_owned()
}

/// The commands that --help lists.
fn commands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| !line.is_empty());
    let names = listed.filter(|line| !line.starts_with("    "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}
