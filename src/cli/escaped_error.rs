//! Escapes hidden characters of the command line that clap's errors repeat, and removes secrets.

use clap::Error;
use clap::builder::StyledStr;
use clap::error::ContextValue;
use nbd_telemetry::escape;

/// Formats clap's error, with hidden characters of the command line escaped, and without the
/// queries of URLs.
pub(crate) fn escaped_text(error: &Error) -> String {
    escape_lines(&error.to_string())
}

/// Escapes the values of the command line that clap's error repeats, and removes the queries of
/// URLs.
pub(crate) fn escape_values(mut error: Error) -> Error {
    let escaped = |text: &String| escape_value(text);
    let unstyled = |text: &StyledStr| {
        let plain = text.to_string();
        let shown = escape_sentence(&plain);
        if shown == plain { text.clone() } else { StyledStr::from(shown) }
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

/// Escapes a message of several lines, and removes the queries of URLs in it.
pub(crate) fn escape_lines(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.strip_suffix('\n') {
            Some(line) => format!("{}\n", escape_sentence(line)),
            None => escape_sentence(line),
        })
        .collect()
}

fn escape_sentence(text: &str) -> String {
    escape::text(&escape::without_secrets(text)).into_owned()
}

/// Escapes an argument, which may be a URL or contain one, and removes the query.
fn escape_value(text: &str) -> String {
    let shown = escape::path(text).to_string();
    let has_secrets = shown != escape::name(text).to_string();
    if has_secrets { shown } else { escape::text(text).into_owned() }
}
