//! Manual pages and completions, by what groff, mandoc and shells make of them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::clients::{run, run_command};
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

/// Lines, and what is completed at their end, in any order.
const COMPLETED: [(&str, &str); 12] = [
    ("hexz-nbd pk", "pki"),
    ("hexz-nbd --tls-client-", "--tls-client-auth --tls-client-ca --tls-client-crl"),
    ("hexz-nbd --tls-client-auth ", "optional require"),
    ("hexz-nbd --sandbox re", "require"),
    ("hexz-nbd pki sho", "show"),
    ("hexz-nbd pki revoke --reason key", "key-compromise"),
    ("hexz-nbd verify --no-", "--no-progress"),
    ("hexz-nbd -v verify --no-", "--no-progress"),
    ("hexz-nbd cache c", "check clear"),
    ("hexz-nbd completions z", "zsh"),
    // Options may follow an archive.
    ("hexz-nbd snap.hxz --tls-client-", "--tls-client-auth --tls-client-ca --tls-client-crl"),
    // No command has this name, and no file.
    ("hexz-nbd verify pk", ""),
];

/// Lines that are completed with the files snap.hxz and web.hxz. Bash completes them itself.
const COMPLETED_WITH_FILES: [(&str, &str); 4] = [
    ("hexz-nbd verify ", "snap.hxz web.hxz"),
    ("hexz-nbd inspect s", "snap.hxz"),
    ("hexz-nbd snap.hxz ", "snap.hxz web.hxz"),
    ("hexz-nbd --config snap.hxz w", "warm web.hxz"),
];

/// Returns words in alphabetical order.
fn sorted(words: &str) -> Vec<&str> {
    let mut words: Vec<_> = words.split_whitespace().collect();
    words.sort_unstable();
    words
}

#[test]
fn bash_completes_commands_options_and_values() {
    for (line, expected) in COMPLETED {
        assert_eq!(sorted(&completed_by_bash(line)), sorted(expected), "{line:?}");
    }
}

#[test]
fn zsh_completes_commands_options_values_and_files() {
    let shell = CompletionFolder::new("zsh", "_hexz-nbd");
    for (line, expected) in COMPLETED.iter().chain(&COMPLETED_WITH_FILES) {
        assert_eq!(sorted(&shell.zsh(line)), sorted(expected), "{line:?}");
    }
    let commands = shell.zsh("hexz-nbd ");
    assert!(commands.contains("verify") && commands.contains("snap.hxz"), "{commands}");
    assert_eq!(shell.zsh("hexz-nbd web=sn").trim(), "snap.hxz");
}

#[test]
fn fish_completes_commands_options_values_and_files() {
    let shell = CompletionFolder::new("fish", "hexz-nbd.fish");
    for (line, expected) in COMPLETED.iter().chain(&COMPLETED_WITH_FILES) {
        assert_eq!(sorted(&shell.fish(line)), sorted(expected), "{line:?}");
    }
}

/// A folder with the completion script of a shell, and one with archives.
struct CompletionFolder(TempDir);

impl CompletionFolder {
    fn new(shell: &str, script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let archives = folder.path().join("archives");
        fs::create_dir(&archives).unwrap();
        for name in ["snap.hxz", "web.hxz"] {
            fs::write(archives.join(name), "").unwrap();
        }
        fs::write(folder.path().join(script), run_binary(["completions", shell]).stdout).unwrap();
        Self(folder)
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.0.path().join("archives")).env("HOME", self.0.path());
        run_command(command).ok()
    }

    /// Returns what zsh offers at the end of a line. An interactive shell on a terminal of its own
    /// completes the line, and prints each match.
    fn zsh(&self, line: &str) -> String {
        const SHELL: &str = r#"
            PROMPT=
            fpath=($FOLDER $fpath)
            autoload -U compinit
            compinit -D -u
            compadd() {
                # Calls that only fill an array add no matches.
                if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then
                    builtin compadd "$@"
                    return
                fi
                local -a hits
                builtin compadd -A hits "$@"
                (( $#hits )) && print -rl -- "HIT "$^hits
                builtin compadd "$@"
            }
            finish() { print END; exit }
            comppostfuncs=(finish)
            print READY
        "#;
        const TERMINAL: &str = r#"
            zmodload zsh/zpty
            zpty shell zsh -f -i
            zpty -w shell '. $FOLDER/setup'
            zpty -r shell printed '*READY*'
            zpty -w -n shell "$1"$'\t'
            zpty -r shell printed '*END*'
            print -r -- "$printed"
        "#;
        fs::write(self.0.path().join("setup"), SHELL).unwrap();
        let mut command = Command::new("timeout");
        command.args(["60", "zsh", "-f", "-c", TERMINAL, "zsh", line]);
        command.current_dir(self.0.path().join("archives")).env("FOLDER", self.0.path());
        let printed = run_command(command).ok();
        assert!(printed.contains("END"), "{line:?}: {printed}");
        let hits = printed.lines().filter_map(|line| Some(line.split_once("HIT ")?.1.trim()));
        hits.collect::<Vec<_>>().join(" ")
    }

    /// Returns what fish offers at the end of a line, without descriptions.
    fn fish(&self, line: &str) -> String {
        let script = self.0.path().join("hexz-nbd.fish");
        let complete = "source $argv[1]; complete -C $argv[2]";
        let args = ["--no-config", "-c", complete, script.to_str().unwrap(), line];
        let offered = self.run("fish", &args);
        let words = offered.lines().filter_map(|line| line.split('\t').next());
        words.collect::<Vec<_>>().join(" ")
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
