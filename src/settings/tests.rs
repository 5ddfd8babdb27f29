//! Tests of the configuration file: values, problems, and the sample with all options.

use std::collections::BTreeSet;
use std::path::Path;

use clap::{Args, Command, CommandFactory, Parser};
use hexz_exports::NamedArchive;

use super::file::{ConfigFile, FileOptions};
use super::problem::ConfigProblem;
use super::*;

const SAMPLE: &str = include_str!("../../examples/hexz-nbd.toml");

fn command() -> Command {
    let mut command = Cli::command();
    command.build();
    command
}

fn problems(text: &str) -> Vec<ConfigProblem> {
    match ConfigFile::parse(text, Path::new("x.toml"), &[]) {
        Ok(file) => file.problems(&command()),
        Err(problem) => vec![problem],
    }
}

fn options(text: &str) -> FileOptions {
    let found = problems(text);
    assert!(found.is_empty(), "{text}: {found:?}");
    ConfigFile::parse(text, Path::new("x.toml"), &[]).unwrap().options().unwrap()
}

#[test]
fn values_have_the_meaning_of_the_command_line() {
    let file = options(
        r#"
        strict = true
        raw = false
        verbose = 2
        listen = ["127.0.0.1:1", "unix:/x"]
        allow = "10.0.0.0/8, ::1"
        deny = ["192.0.2.1", "192.0.2.2,192.0.2.3"]
        max-connections = 7
        max-handshakes = "8"
        tls-min = 1.3
        sandbox = "off"
        cache-size = "1GiB"
        max-in-flight = 67108864
        idle-timeout = "5min"
        user = 0
        export-dir = "/x"
        [exports]
        z = "a=b.hexz"
        "a=b" = "c"
    "#,
    );
    let line = ["hexz-nbd", "--listen=127.0.0.1:1", "--listen=unix:/x", "--sandbox=off", "x"];
    let access = ["--user=0", "--allow=10.0.0.0/8, ::1", "--deny=192.0.2.1"];
    let line = line.iter().chain(&access).chain(&["--deny=192.0.2.2,192.0.2.3"]);
    let line = Cli::try_parse_from(line).unwrap();
    // Options that the file doesn't set have no defaults yet, and archives have no option.
    let names = |archives: &[NamedArchive]| -> Vec<_> {
        archives.iter().map(|archive| (archive.name.clone(), archive.path.clone())).collect()
    };
    let named = [("z", "a=b.hexz"), ("a=b", "c")];
    assert_eq!(names(&file.exports), named.map(|(name, path)| (name.into(), path.into())));
    let (serve, log) = (file.serve, file.log);
    let all = &serve.changeable;
    assert_eq!(all.snapshots.export_dir, Some("/x".into()));
    assert!(all.snapshots.strict && !all.snapshots.opening.raw);
    assert_eq!(all.access, line.serve.changeable.access);
    assert_eq!(serve.network.listen, line.serve.network.listen);
    assert_eq!(log.verbose, 2);
    let text = |options: &dyn std::fmt::Debug| format!("{options:?}");
    assert_eq!(text(&serve.sandbox), text(&line.serve.sandbox));
    for value in ["max_connections: 7", "max_handshakes: 8", "tls_min: V1_3", "1073741824"] {
        assert!(text(&serve).contains(value), "{value}: {serve:?}");
    }
    for value in ["(67108864 bytes)", "idle_timeout: Some(300s)"] {
        assert!(text(&serve).contains(value), "{value}: {serve:?}");
    }
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// Each problem has the line of its cause, and names the key.
#[test]
fn each_problem_has_its_label_and_line() {
    for (text, label, line, named) in [
        ("\n\nstrict = true true", "config_syntax", 3, ""),
        ("strict = true\nstrict = true", "config_syntax", 2, ""),
        ("\nlisen = 1", "config_unknown_option", 2, "listen"),
        ("max_connections = 1", "config_unknown_option", 1, "max-connections"),
        ("\"--listen\" = 1", "config_unknown_option", 1, "listen"),
        ("Watch = true", "config_unknown_option", 1, "watch"),
        ("cert = \"x\"", "config_unknown_option", 1, "tls-cert"),
        ("maximum-connection = 1", "config_unknown_option", 1, "max-connections"),
        ("qwertz = 1", "config_unknown_option", 1, "--help"),
        ("[[rule]]", "config_unknown_option", 1, "rules"),
        ("\n[tls]\ncert = \"x\"\nmin = 1", "config_unknown_option", 2, "tls-cert, tls-min"),
        ("tls.cert = \"x\"", "config_unknown_option", 1, "tls-cert"),
        ("[limits]\nmax-connections = 1", "config_unknown_option", 1, "max-connections"),
        ("password = \"x\"", "config_misplaced_option", 1, "password-file"),
        ("config = \"x\"", "config_misplaced_option", 1, "config"),
        ("check-config = true", "config_misplaced_option", 1, "check-config"),
        ("help = true", "config_misplaced_option", 1, "help"),
        ("version = true", "config_misplaced_option", 1, "version"),
        ("stdio = true", "config_misplaced_option", 1, "stdio"),
        ("[exports]\nlisten = \"::1:1\"", "config_misplaced_option", 2, "listen"),
        ("strict = \"yes\"", "config_invalid_value", 1, "strict: invalid type: string"),
        ("verbose = true", "config_invalid_value", 1, "verbose"),
        ("verbose = -1", "config_invalid_value", 1, "\"-1\""),
        ("verbose = 10", "config_invalid_value", 1, "from 0 to 9"),
        ("listen = true", "config_invalid_value", 1, "a string or an array of strings"),
        ("user = [\"a\", \"b\"]", "config_invalid_value", 1, "a string or a number"),
        ("idle-timeout = 07:32:00", "config_invalid_value", 1, "a string or a number"),
        ("allow = []", "config_invalid_value", 1, "allow"),
        ("max-connections = 0", "config_invalid_value", 1, "from 1 to 1000000"),
        ("max-connections = \"0x10\"", "config_invalid_value", 1, "\"0x10\""),
        ("idle-timeout = 5", "config_invalid_value", 1, "30s"),
        ("cache-size = \"much\"", "config_invalid_value", 1, "256MiB"),
        ("max-in-flight = 1", "config_invalid_value", 1, "32.0 MiB"),
        ("sandbox = \"on\"", "config_invalid_value", 1, "auto or require or off"),
        ("rules = \"\"", "config_invalid_value", 1, "rules"),
        ("allow = [\"\"]", "config_invalid_value", 1, "allow"),
        ("deny = [\"::1\",\n\"10.0.0.1/8\"]", "config_invalid_value", 2, "\"10.0.0.1/8\""),
        ("deny = \"::1,x\"", "config_invalid_value", 1, "\"x\""),
        ("exports = 1", "config_invalid_value", 1, "exports"),
        ("[exports]\na = 1", "config_invalid_value", 2, "[exports] a"),
        ("[exports]\na.hexz = \"x\"", "config_invalid_value", 2, "\"a.hexz\""),
        ("[exports]\n\"\" = \"x\"", "config_invalid_value", 2, "[exports]"),
        ("[exports]\na = \"\"", "config_invalid_value", 2, "[exports] a"),
    ] {
        let found = problems(text);
        let [problem] = found.as_slice() else { panic!("{text}: {found:?}") };
        assert_eq!((problem.label(), problem.line), (label, Some(line)), "{text}: {problem}");
        assert!(problem.to_string().contains(named), "{text}: {problem}");
    }
}

/// The wording of messages, which are about the file and not about a command line.
#[test]
fn wording() {
    for (text, message) in [
        ("\nlisen = 1", "x.toml, line 2: unknown option \"lisen\"; did you mean listen?"),
        (
            "[tls]\ncert = \"x\"",
            "x.toml, line 1: unknown table [tls]: options belong above all tables, as tls-cert",
        ),
        (
            "max-connections = 0",
            "x.toml, line 1: max-connections: invalid value \"0\": expected a whole number from 1 \
             to 1000000",
        ),
        ("strict = 1", "x.toml, line 1: strict: invalid type: integer `1`, expected a boolean"),
    ] {
        assert_eq!(problems(text)[0].to_string(), message);
    }
}

#[test]
fn all_problems_are_reported_in_order() {
    let found = problems("strict = 1\nx = 1\n[exports]\nb = 1\na = 2\n");
    let lines: Vec<_> = found.iter().filter_map(|problem| problem.line).collect();
    assert_eq!(lines, [1, 2, 4, 5]);
    // The number of problems is limited for a file of another kind.
    let text: String = (0..10_000).map(|key| format!("x{key} = 1\n")).collect();
    assert_eq!(problems(&text).len(), 50);
}

/// Values of ignored keys aren't looked up.
#[test]
fn ignored_keys_are_not_parsed() {
    let text = "user = \"nobody-of-this-name\"\nstrict = true";
    assert_eq!(problems(text).len(), 1);
    let file = ConfigFile::parse(text, Path::new("x.toml"), RESOLVED_AT_STARTUP).unwrap();
    assert!(file.problems(&command()).is_empty());
    assert_eq!(file.values("user"), Some(owned(&["nobody-of-this-name"])));
    file.options().unwrap();
}

#[test]
fn reloadable_options_are_listed() {
    let reloadable = ReloadableOptions::augment_args(Command::new(""));
    let options: BTreeSet<_> = keys::all(&reloadable).filter_map(clap::Arg::get_long).collect();
    assert_eq!(options, BTreeSet::from(RELOADABLE));
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
    let (keys_with_values, exports) = SAMPLE.split_once("#[exports]").unwrap();
    let command = Cli::command();
    let mut there = BTreeSet::new();
    for (key, line) in keys_with_values.lines().filter_map(setting) {
        options(line);
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
    assert_eq!(options(&exports).exports.len(), 2);
    options(SAMPLE);
}
