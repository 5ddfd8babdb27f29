//! Tests each message, and that the sample contains all options.

use std::collections::BTreeSet;
use std::path::Path;

use clap::CommandFactory;

use super::file::{self, FileContents};
use super::{Cli, keys};

const SAMPLE: &str = include_str!("../../examples/hexz-nbd.toml");

fn parse(text: &str) -> (FileContents, Vec<String>) {
    let mut command = Cli::command();
    command.build();
    let (written, problems) = file::parse(text, Path::new("x.toml"), &command);
    (written, problems.iter().map(ToString::to_string).collect())
}

fn problems(text: &str) -> Vec<String> {
    parse(text).1
}

#[test]
fn a_file_is_converted_to_arguments() {
    let text = r#"
        strict = true
        raw = false
        verbose = 2
        listen = ["127.0.0.1:1", "unix:/x"]
        allow = "10.0.0.0/8,::1"
        max-connections = 7
        tls-min = 1.3
        cache-size = "1GiB"
        [exports]
        z = "a=b.hexz"
        "a=b" = "c"
    "#;
    let (written, problems) = parse(text);
    assert!(problems.is_empty(), "{problems:?}");
    let arguments = written.entries.iter().flat_map(|entry| &entry.arguments);
    assert!(arguments.eq([
        "--strict",
        "--verbose",
        "--verbose",
        "--listen=127.0.0.1:1",
        "--listen=unix:/x",
        "--allow=10.0.0.0/8,::1",
        "--max-connections=7",
        "--tls-min=1.3",
        "--cache-size=1GiB",
    ]));
    let exports = written.exports.iter().map(|named| (named.name.as_str(), named.path.as_path()));
    assert!(exports.eq([("z", Path::new("a=b.hexz")), ("a=b", Path::new("c"))]));
    assert!(parse("").0.entries.is_empty());
}

/// Each message names the file, the line and the key, and says what to do.
#[test]
fn each_problem_has_its_message() {
    let only = "is for the command line alone: it";
    for (text, message) in [
        ("\n\nstrict = true true", "x.toml, line 3: it isn't TOML"),
        ("strict = true\nstrict = true", "line 2: it isn't TOML: duplicate key"),
        ("\nlisen = 1", "x.toml, line 2: there is no option \"lisen\"; listen is meant, perhaps"),
        ("max_connections = 1", "; max-connections is meant, perhaps"),
        ("\"--listen\" = 1", "; listen is meant, perhaps"),
        ("Watch = true", "; watch is meant, perhaps"),
        ("cert = \"x\"", "; tls-cert is meant, perhaps"),
        ("maximum-connection = 1", "; max-connections is meant, perhaps"),
        ("qwertz = 1", "; hexz-nbd --help lists all"),
        ("[[rule]]", "; rules is meant, perhaps"),
        ("password = \"x\"", "line 1: a password doesn't belong in here: password-file names"),
        ("config = \"x\"", "config is for the command line alone: a configuration file can't"),
        ("check-config = true", only),
        ("help = true", only),
        ("version = true", only),
        ("stdio = true", "stdio is for the command line alone: whoever"),
        (
            "\n[tls]\ncert = \"x\"\nmin = 1",
            "line 2: there is no table [tls]: options stand above all tables, as tls-cert, tls-min",
        ),
        ("tls.cert = \"x\"", "line 1: there is no table [tls]"),
        ("[limits]\nmax-connections = 1", "above all tables, as max-connections"),
        ("strict = \"yes\"", "strict: expected true or false, found a string"),
        ("verbose = true", "verbose: expected a whole number, found true or false"),
        ("verbose = -1", "verbose: \"-1\" can't be used: expected a whole number from 0 to 9"),
        ("listen = true", "listen: expected a string or an array of strings, found true or false"),
        ("user = [\"a\"]", "user: expected a string or a number, found an array"),
        ("idle-timeout = 07:32:00", "idle-timeout: expected a string or a number, found a date"),
        ("allow = []", "allow = [] means nothing: leave it out, or name some"),
        ("max-connections = 0", "max-connections: \"0\" can't be used: it must be at least 1"),
        ("max-connections = 0x10", "max-connections: \"0x10\" can't be used"),
        ("idle-timeout = 5", "idle-timeout: \"5\" can't be used: time unit needed"),
        ("cache-size = \"much\"", "expected something like 256MiB"),
        ("sandbox = \"on\"", "sandbox: \"on\" can't be used: expected auto or require or off"),
        ("rules = \"\"", "rules: \"\" can't be used: there is nothing in it"),
        (
            "deny = [\"::1\",\n\"10.0.0.1/8\"]",
            "line 2: deny: \"10.0.0.1/8\" can't be used: \"10.0.0.1/8\" has bits set",
        ),
        ("deny = \"::1,x\"", "deny: \"x\" can't be used"),
        ("exports = 1", "exports: expected a table of NAME = \"PATH\", found a number"),
        ("[exports]\na = 1", "line 2: [exports] a: expected a path in quotes, found a number"),
        ("[exports]\na.hexz = \"x\"", "is written in quotes, as \"a.hexz\""),
        ("[exports]\n\"\" = \"x\"", "[exports]: a name and a path have one character"),
        ("[exports]\na = \"\"", "[exports]: a name and a path have one character"),
        ("[exports]\nlisten = \"::1:1\"", "line 2: listen stands in [exports]"),
    ] {
        let found = problems(text);
        let [problem] = found.as_slice() else { panic!("{text}: {found:?}") };
        assert!(problem.contains(message), "{text}: {problem}");
        assert!(
            !problem.contains("--") || text.contains("--") || message.contains("--"),
            "{text}: {problem}"
        );
    }
}

#[test]
fn all_problems_are_reported_in_order() {
    let found = problems("strict = 1\nx = 1\n[exports]\na = 1\nb = 2\n");
    let lines: Vec<_> = found.iter().map(|problem| problem.split(':').next().unwrap()).collect();
    assert_eq!(lines, [1, 2, 4, 5].map(|line| format!("x.toml, line {line}")));
    // The number of problems is limited for a file of another kind.
    let text: String = (0..10_000).map(|key| format!("x{key} = 1\n")).collect();
    assert_eq!(problems(&text).len(), 50);
}

/// Returns the option of a sample's line that sets one, or would without its `#`.
fn setting(line: &str) -> Option<(&str, &str)> {
    let line = line.strip_prefix('#').unwrap_or(line);
    let (key, _) = line.split_once(" = ")?;
    (!key.is_empty() && !key.starts_with(['"', ' ', '['])).then_some((key, line))
}

/// A new option must be added to the sample, too.
#[test]
fn the_sample_has_every_option_and_its_default() {
    let (options, exports) = SAMPLE.split_once("#[exports]").unwrap();
    let command = Cli::command();
    let mut there = BTreeSet::new();
    for (key, line) in options.lines().filter_map(setting) {
        let found = problems(line);
        assert!(found.is_empty(), "{line}: {found:?}");
        assert!(there.insert(key), "{key} is there twice");
        let option = keys::option(&command, key).unwrap();
        let value = line[key.len() + 3..].split("  #").next().unwrap().trim().trim_matches('"');
        if let [default] = option.get_default_values() {
            // Options with a default value, which includes flags.
            assert_eq!(default.to_str().unwrap(), value, "{key}");
        }
    }
    let all: BTreeSet<&str> = keys::all(&command).filter_map(|arg| arg.get_long()).collect();
    assert_eq!(there, all);
    let exports = format!("[exports]{}", exports.replace("\n#", "\n"));
    assert_eq!(parse(&exports).0.exports.len(), 2, "{:?}", problems(&exports));
    assert!(problems(SAMPLE).is_empty());
}
