//! Tests of the configuration file: values, problems, and the sample with all options.

use std::collections::BTreeSet;
use std::path::Path;

use clap::{Args, Command, CommandFactory, Parser};

use super::file::{ConfigFile, FileOptions};
use super::problem::ConfigProblem;
use super::*;
use crate::cli::ReloadableOptions;
use crate::cli::escaped_error::escape_values;

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
        "strict = true\nraw = false\nverbose = 2\nlisten = ['127.0.0.1:1', 'unix:/x']\n\
         allow = '10.0.0.0/8, ::1'\nmax-connections = 7\nmax-handshakes = '8'\ntls-min = 1.3\n\
         cache-size = '1GiB'\nmax-in-flight = 67108864\nidle-timeout = '5min'\nuser = 0\n\
         [exports]\nz = 'a=b.hexz'\n'a=b' = 'c'",
    );
    let line = ["hexz-nbd", "--listen=127.0.0.1:1", "--listen=unix:/x", "--allow=10.0.0.0/8, ::1"];
    let line = Cli::try_parse_from(line.iter().chain(&["--strict", "x"])).unwrap().serve;
    let names: Vec<_> = file.exports.iter().map(|archive| archive.name.as_str()).collect();
    assert_eq!((names, file.log.verbose), (vec!["z", "a=b"], 2));
    let (all, of_line) = (&file.serve.changeable, &line.changeable);
    assert_eq!(all.snapshots.strict, of_line.snapshots.strict);
    assert_eq!(all.access, of_line.access);
    assert_eq!(file.serve.network.listen, line.network.listen);
    let text = format!("{:?}", file.serve);
    for value in ["max_connections: 7", "max_handshakes: 8", "tls_min: V1_3", "Uid(0)"] {
        assert!(text.contains(value), "{value}: {text}");
    }
    for value in ["(1073741824 bytes)", "(67108864 bytes)", "idle_timeout: Some(300s)"] {
        assert!(text.contains(value), "{value}: {text}");
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
        ("qwertz = 1", "config_unknown_option", 1, "--help"),
        ("\n[export]\na = \"x\"", "config_unknown_option", 2, "did you mean [exports]?"),
        ("[Exports]\na = \"x\"", "config_unknown_option", 1, "did you mean [exports]?"),
        ("export.a = \"x\"", "config_unknown_option", 1, "did you mean [exports]?"),
        ("[[rule]]", "config_unknown_option", 1, "rules"),
        ("\n[tls]\ncert = \"x\"\nmin = 1", "config_unknown_option", 2, "tls-cert, tls-min"),
        ("tls.cert = \"x\"", "config_unknown_option", 1, "tls-cert"),
        ("password = \"x\"", "config_misplaced_option", 1, "password-file"),
        ("config = \"x\"", "config_misplaced_option", 1, "config"),
        ("stdio = true", "config_misplaced_option", 1, "stdio"),
        ("[exports]\nlisten = \"::1:1\"", "config_misplaced_option", 2, "listen"),
        ("strict = \"yes\"", "config_invalid_value", 1, "strict: invalid type: string"),
        ("verbose = true", "config_invalid_value", 1, "verbose"),
        ("verbose = -1", "config_invalid_value", 1, "\"-1\""),
        ("listen = true", "config_invalid_value", 1, "a string or an array of strings"),
        ("user = [\"a\", \"b\"]", "config_invalid_value", 1, "a string or a number"),
        ("idle-timeout = 07:32:00", "config_invalid_value", 1, "a string or a number"),
        ("allow = []", "config_invalid_value", 1, "allow"),
        ("max-connections = 0", "config_invalid_value", 1, "from 1 to 1000000"),
        ("max-connections = \"0x10\"", "config_invalid_value", 1, "\"0x10\""),
        ("max-requests = \"abc\"", "config_invalid_value", 1, "from 1 to 4294967295"),
        ("idle-timeout = 5", "config_invalid_value", 1, "5s"),
        ("idle-timeout = 0", "config_invalid_value", 1, "longer than zero"),
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

/// Some commands don't know some options, and most options take no URL: whatever the error is, it
/// doesn't show what may be a signature.
#[test]
fn errors_do_not_show_queries_of_urls() {
    const SECRET: &str = "s3cret";
    let urls = [
        format!("https://h/v7/?sig={SECRET}"),
        format!("HTTPS://h/web.hxz?sig={SECRET}'{SECRET}"),
        format!("web=gcs://b/k?{SECRET} {SECRET}"),
        format!("s3:/b/?{SECRET}"),
    ];
    let command = command();
    let mut failures = 0;
    let mut check = |words: &[&str]| {
        let line: Vec<OsString> = words.iter().map(Into::into).collect();
        let error = match Settings::read(&line) {
            Err(SettingsError::CommandLine(error)) => {
                SettingsError::CommandLine(escape_values(error))
            }
            Err(error) => error,
            Ok(_) => return,
        };
        let shown = error.to_string();
        assert!(!shown.contains(SECRET), "{words:?}: {shown}");
        failures += 1;
    };
    for command in std::iter::once(&command).chain(command.get_subcommands()) {
        let name = command.get_name();
        let start: &[&str] = if name == "hexz-nbd" { &["hexz-nbd"] } else { &["hexz-nbd", name] };
        for url in &urls {
            check(&[start, &[url]].concat());
            check(&[start, &[url, "--none"]].concat());
            check(&[start, &[&format!("--none={url}")]].concat());
            check(&[start, &["--monitor", "https://h:80/x?s3cret"]].concat());
            for option in command.get_arguments().filter_map(|arg| arg.get_long()) {
                check(&[start, &[&format!("--{option}={url}"), "x"]].concat());
            }
        }
    }
    assert!(failures > 500, "{failures}");

    for url in &urls {
        for text in [
            format!("[exports]\na = \"{url}\""),
            format!("exports = \"{url}\""),
            format!("[exports]\n\"{url}\" = \"\""),
            format!("export-dir = \"{url}\""),
            format!("parent-dir = [\"{url}\"]"),
            format!("traces = \"{url}\""),
            format!("max-connections = \"{url}\""),
            format!("watch = \"{url}\""),
            format!("[stores.\"{url}\"]\nstore-style = \"{url}\""),
            format!("\"{url}\" = 1"),
        ] {
            for problem in problems(&text) {
                assert!(!problem.to_string().contains(SECRET), "{text}: {problem}");
            }
        }
    }
}

/// The program may be built without support for stores.
#[cfg(not(feature = "remote"))]
#[test]
fn urls_are_explained_without_the_feature() {
    let read = |words: &[&str]| {
        let line: Vec<OsString> = ["hexz-nbd"].iter().chain(words).map(Into::into).collect();
        Settings::read(&line).unwrap_err().to_string()
    };
    let url = "https://h/web.hxz?s3cret";
    for words in [
        &[url][..],
        &["web=S3://golden/web.hxz"],
        &["--export-dir", "gs://golden/v7/"],
        &["web.hxz", "--parent-dir", "az://golden/"],
        &["verify", url],
        &["inspect", url],
        &["digest", url],
    ] {
        let error = read(words);
        assert!(error.contains("feature \"remote\"") && !error.contains("s3cret"), "{error}");
    }
    for text in [
        "[exports]\nweb = \"https://h/web.hxz?s3cret\"",
        "export-dir = \"s3://golden/\"",
        "parent-dir = [\"s3://golden/\"]",
    ] {
        let problems = problems(text);
        assert_eq!(problems.len(), 1, "{text}");
        let shown = problems[0].to_string();
        assert!(shown.contains("feature \"remote\"") && !shown.contains("s3cret"), "{shown}");
    }
}
