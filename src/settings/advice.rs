//! Adds advice to clap's errors for common mistakes, such as options of other programs, a missing
//! archive or a misspelled command.

use std::ffi::OsString;
use std::path::Path;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, Command, Error};
use nbd_telemetry::escape;

/// ID of the archives' argument in clap.
const ARCHIVES_ID: &str = "named";

/// Options of nbdkit, qemu-nbd, nbd-server and nginx, and advice on what to use instead.
#[rustfmt::skip]
const FOREIGN_OPTIONS: [(&[&str], &str); 5] = [
    (
        &["--port", "-p", "--bind", "-b", "--address", "--ipaddr", "-i", "--socket", "-k", "--unix"],
        "--listen sets the address: ADDRESS:PORT or unix:PATH",
    ),
    (
        &["--readonly", "--read-only", "-r"],
        "all exports are read-only, so there is no option for it",
    ),
    (
        &["--tls", "--tls-creds", "--tls-certificates", "--cert", "--key"],
        "--tls-cert sets the certificate, --tls-key its key",
    ),
    (&["--export-name", "-x", "--name"], "NAME=PATH sets the name of an export"),
    (&["-c", "--config-file", "-f"], "--config sets the configuration file"),
];

/// Adds advice to clap's error about `arguments`. Commands have other options, for which clap's
/// own suggestions suffice.
pub(super) fn advise(mut error: Error, command: &Command, arguments: &[OsString]) -> Error {
    let is_command = |word: &OsString| command.get_subcommands().any(|it| it.get_name() == word);
    if arguments.iter().skip(1).any(is_command) {
        return error;
    }
    if error.kind() == ErrorKind::InvalidUtf8 {
        let odd = arguments.iter().filter(|word| word.to_str().is_none());
        let odd: Vec<String> = odd.map(|word| format!("{:?}", escape::path(word))).collect();
        let what = format!("invalid UTF-8: {}", odd.join(", "));
        return command.clone().error(ErrorKind::InvalidUtf8, what);
    }
    let strings = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => vec![text.clone()],
        Some(ContextValue::Strings(texts)) => texts.clone(),
        _ => Vec::new(),
    };
    let names = strings(ContextKind::InvalidArg);
    let advice = match error.kind() {
        ErrorKind::MissingRequiredArgument if names == ["<[NAME=]PATH>..."] => Some(
            "name an archive, a folder of archives with --export-dir, or a configuration file with \
             --config; \"hexz-nbd demo\" serves a built-in archive",
        ),
        ErrorKind::UnknownArgument => FOREIGN_OPTIONS
            .iter()
            .find(|(foreign, _)| names.iter().any(|name| foreign.contains(&name.as_str())))
            .map(|(_, advice)| *advice),
        _ => None,
    };
    if let Some(advice) = advice {
        // The usage is that of the option that clap would have suggested.
        error.remove(ContextKind::SuggestedArg);
        error.remove(ContextKind::Usage);
        let advice = ContextValue::StyledStrs(vec![StyledStr::from(advice)]);
        error.insert(ContextKind::Suggested, advice);
    }
    error
}

/// Returns a note about the command that may have been meant if the first archive doesn't exist
/// and has a similar name. It is needed since other archives are served without it.
pub(super) fn misspelled_command(command: &Command, matches: &ArgMatches) -> Option<String> {
    let word = matches.get_raw(ARCHIVES_ID)?.next()?.to_str()?;
    if Path::new(word).exists() {
        return None;
    }
    let nearest = nearest_command(command, word)?;
    Some(format!(
        "{:?} is treated as an archive, but there is no such file; did you mean the command \
         {nearest}?",
        escape::path(word)
    ))
}

/// Returns the nearest command that differs in at most one letter in three.
fn nearest_command<'a>(command: &'a Command, word: &str) -> Option<&'a str> {
    let distance = |name: &str| strsim::damerau_levenshtein(name, word);
    let names = command.get_subcommands().map(Command::get_name);
    let near = names.filter(|name| distance(name) <= name.chars().count() / 3);
    near.min_by_key(|name| distance(name))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::{Cli, Settings};
    use super::*;

    fn error_for(arguments: &[&str]) -> String {
        let line: Vec<OsString> =
            ["hexz-nbd"].iter().chain(arguments).map(|word| word.into()).collect();
        Settings::read(&line).unwrap_err().to_string()
    }

    #[test]
    fn a_command_line_without_archives_gets_advice() {
        let error = error_for(&[]);
        for option in ["<[NAME=]PATH>...", "--export-dir", "--config", "hexz-nbd demo"] {
            assert!(error.contains(option), "{error}");
        }
        // There is none about another missing argument.
        let error = error_for(&["--tls-cert", "x", "snap.hexz"]);
        assert!(error.contains("--tls-key") && !error.contains("demo"), "{error}");
        let error = error_for(&["check", "--from=::1", "--rules=x", "--allow=::1"]);
        assert!(error.contains("--rules conflicts with --allow"), "{error}");
    }

    #[test]
    fn options_of_other_programs_suggest_equivalents() {
        for (option, right) in [
            ("--port=1", "--listen"),
            ("-p", "--listen"),
            ("--cert=x", "--tls-cert"),
            ("-c", "--config"),
            ("--read-only", "read-only"),
        ] {
            let error = error_for(&[option, "snap.hexz"]);
            assert!(error.contains(right) && !error.contains("--export-dir"), "{error}");
        }
        let error = error_for(&["doctor", "--port=1", "nbd.example.org"]);
        assert!(error.contains("'--port'") && !error.contains("--listen"), "{error}");
        let error = error_for(&["--alow=::1", "snap.hexz"]);
        assert!(error.contains("a similar argument exists: '--allow'"), "{error}");
    }

    /// None of them may shadow an existing option.
    #[test]
    fn foreign_options_do_not_shadow_real_ones() {
        let mut command = Cli::command();
        command.build();
        for arg in command.get_arguments() {
            let long = arg.get_long().map(|long| format!("--{long}"));
            let short = arg.get_short().map(|short| format!("-{short}"));
            for name in long.into_iter().chain(short) {
                assert!(!FOREIGN_OPTIONS.iter().any(|(names, _)| names.contains(&name.as_str())));
            }
        }
    }

    #[test]
    fn misspelled_commands_are_recognized() {
        let command = Cli::command();
        let meant = |word| {
            let matches = Cli::command().try_get_matches_from(["hexz-nbd", word]).unwrap();
            misspelled_command(&command, &matches)
        };
        let error = meant("verfy").unwrap();
        assert!(error.contains("\"verfy\"") && error.contains("verify"), "{error}");
        assert!(meant("inspetc").unwrap().contains("inspect"));
        for word in ["snap.hexz", "web=verfy", "/srv/verfy", "web", "Cargo.toml"] {
            assert_eq!(meant(word), None, "{word}");
        }
    }
}
