//! Escapes hidden characters of the command line that clap's errors repeat.

use clap::Error;
use clap::builder::StyledStr;
use clap::error::ContextValue;
use nbd_telemetry::escape;

/// Formats clap's error, with hidden characters of the command line escaped.
pub(crate) fn escaped_text(error: &Error) -> String {
    escape_lines(&error.to_string())
}

/// Escapes the values of the command line that clap's error repeats.
pub(crate) fn escape_values(mut error: Error) -> Error {
    let escaped = |text: &String| escape::text(text).into_owned();
    let unstyled = |text: &StyledStr| {
        let plain = text.to_string();
        match plain.contains(escape::is_hidden) {
            true => StyledStr::from(escape::text(&plain).into_owned()),
            false => text.clone(),
        }
    };
    let values: Vec<_> = error
        .context()
        .filter_map(|(kind, value)| match value {
            ContextValue::String(text) => Some((kind, ContextValue::String(escaped(text)))),
            ContextValue::Strings(texts) => {
                Some((kind, ContextValue::Strings(texts.iter().map(escaped).collect())))
            }
            // Suggestions repeat values as well.
            ContextValue::StyledStr(text) => Some((kind, ContextValue::StyledStr(unstyled(text)))),
            ContextValue::StyledStrs(texts) => {
                Some((kind, ContextValue::StyledStrs(texts.iter().map(unstyled).collect())))
            }
            _ => None,
        })
        .collect();
    for (kind, value) in values {
        error.insert(kind, value);
    }
    error
}

pub(crate) fn escape_lines(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.strip_suffix('\n') {
            Some(line) => format!("{}\n", escape::text(line)),
            None => escape::text(line).into_owned(),
        })
        .collect()
}
