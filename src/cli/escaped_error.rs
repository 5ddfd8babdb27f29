//! Escapes hidden characters of the command line that clap's errors repeat.

use clap::Error;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue};
use nbd_telemetry::escape;

/// Formats clap's error, with hidden characters of the command line escaped.
pub(crate) fn escaped_text(error: &Error) -> String {
    escape_lines(&error.to_string())
}

/// Escapes the values of the command line that clap's error repeats.
pub(crate) fn escape_values(mut error: Error) -> Error {
    let escaped = |text: &String| escape_line(text);
    let values: Vec<_> = error
        .context()
        .filter_map(|(kind, value)| match value {
            ContextValue::String(text) => Some((kind, ContextValue::String(escaped(text)))),
            ContextValue::Strings(texts) => {
                Some((kind, ContextValue::Strings(texts.iter().map(escaped).collect())))
            }
            // The usage has several lines, and repeats no values.
            ContextValue::StyledStr(text) if kind == ContextKind::Usage => {
                Some((kind, ContextValue::StyledStr(escape_styled(text, escape_lines))))
            }
            // Suggestions repeat values as well.
            ContextValue::StyledStr(text) => {
                Some((kind, ContextValue::StyledStr(escape_styled(text, escape_line))))
            }
            ContextValue::StyledStrs(texts) => {
                let texts = texts.iter().map(|text| escape_styled(text, escape_line));
                Some((kind, ContextValue::StyledStrs(texts.collect())))
            }
            _ => None,
        })
        .collect();
    for (kind, value) in values {
        error.insert(kind, value);
    }
    error
}

/// Escapes styled text, which loses its style only if that changes it.
fn escape_styled(text: &StyledStr, escape: fn(&str) -> String) -> StyledStr {
    let plain = text.to_string();
    let escaped = escape(&plain);
    if escaped == plain { text.clone() } else { StyledStr::from(escaped) }
}

fn escape_line(text: &str) -> String {
    escape::text(text).into_owned()
}

/// Escapes hidden characters except line breaks.
pub(crate) fn escape_lines(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.strip_suffix('\n') {
            Some(line) => format!("{}\n", escape::text(line)),
            None => escape::text(line).into_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::CommandFactory;

    fn message(args: &[&str]) -> String {
        let args = ["hexz-nbd"].iter().chain(args);
        let error = Cli::command().try_get_matches_from(args).unwrap_err();
        escape_values(error).render().to_string()
    }

    #[test]
    fn the_usage_keeps_its_lines() {
        for args in [&["--nosuch", "snap.hxz"][..], &["pki", "--nosuch"], &["verify"]] {
            let message = message(args);
            assert!(!message.contains("\\n"), "{message}");
            assert!(message.lines().any(|line| line.starts_with("Usage: hexz-nbd ")), "{message}");
        }
    }

    #[test]
    fn values_stay_on_one_line() {
        for args in
            [&["--nosuch\nready: forged\u{1b}[2J"][..], &["--max-connections", "1\nready: forged"]]
        {
            let message = message(args);
            assert!(!message.lines().any(|line| line.starts_with("ready:")), "{message}");
            assert!(!message.contains('\u{1b}'), "{message}");
            assert!(message.contains("\\nready: forged"), "{message}");
        }
    }
}
