//! Parsers for the values of options, with their error messages.

use std::ffi::OsStr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::{OsStringValueParser, TypedValueParser};
use nbd_gateway::access::Moment;

/// Maximum of a count: more connections than a machine has ports for.
const MOST: usize = 1_000_000;

/// Maximum duration: longer than anyone waits, and short enough for clocks not to overflow.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// Parses one value of a comma-separated list, without the spaces in front of it.
pub(super) fn trimmed<T: FromStr>(text: &str) -> Result<T, T::Err> {
    text.trim_start_matches(' ').parse()
}

/// Returns a parser for values that may contain a path, which need not be UTF-8.
pub(super) fn os_text<T, E>(
    parse: impl Fn(&OsStr) -> Result<T, E> + Clone + Send + Sync + 'static,
) -> impl TypedValueParser<Value = T>
where
    T: Clone + Send + Sync + 'static,
    E: ToString,
{
    OsStringValueParser::new().try_map(move |text| parse(&text).map_err(|error| error.to_string()))
}

pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(number) if number > MOST => Err(format!("it must be at most {MOST}")),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

pub(super) fn size(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(|error| format!("{error}; expected something like 256MiB or 1GiB"))
}

/// Returns a parser for sizes within `range`, in bytes.
pub(super) fn size_within(
    range: RangeInclusive<u64>,
) -> impl Fn(&str) -> Result<ByteSize, String> + Clone {
    move |text| match size(text)? {
        size if size.as_u64() < *range.start() => {
            Err(format!("it must be at least {}", ByteSize(*range.start())))
        }
        size if size.as_u64() > *range.end() => {
            Err(format!("it must be at most {}", ByteSize(*range.end())))
        }
        size => Ok(size),
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("it must be more than nothing".to_owned()),
        Ok(duration) if duration > LONGEST => Err("it must be at most a year".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!("{error}; expected something like 30s or 2min")),
    }
}

pub(super) fn moment(text: &str) -> Result<Moment, String> {
    humantime::parse_rfc3339_weak(text)
        .map(Moment::from)
        .map_err(|_| "expected a time in UTC such as 2027-01-31T18:00:00Z".to_owned())
}
