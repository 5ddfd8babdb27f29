//! Parsers for the values of options, with their error messages.

use std::ffi::OsStr;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::{OsStringValueParser, TypedValueParser};
use humantime::DurationError;
use nbd_gateway::access::Timestamp;
use nbd_telemetry::escape;

/// Maximum of a count: more connections than a machine has ports for.
pub(super) const MAX_COUNT: u32 = 1_000_000;

/// Maximum duration: longer than anyone waits, and short enough for clocks not to overflow.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);

/// Maximum validity of a certificate, in days: a century.
pub(crate) const MAX_VALIDITY_DAYS: u32 = 36_500;

const MAX_VALIDITY: Duration = Duration::from_secs(MAX_VALIDITY_DAYS as u64 * 24 * 3600);

/// Maximum length of a common name, in characters (RFC 5280, `ub-common-name`).
pub(crate) const MAX_COMMON_NAME_CHARS: usize = 64;

/// Maximum length of a name, in bytes: that of a SPIFFE ID.
const MAX_NAME_BYTES: usize = 2048;

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

/// Parses a whole number from `MIN` to `MAX`.
pub(super) fn number<T, const MIN: u32, const MAX: u32>(text: &str) -> Result<T, String>
where
    T: TryFrom<u32>,
{
    let number = text.parse().ok().filter(|number| (MIN..=MAX).contains(number));
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("expected a whole number from {MIN} to {MAX}"))
}

/// Parses a number of clients or connections.
pub(super) fn count(text: &str) -> Result<usize, String> {
    number::<usize, 1, MAX_COUNT>(text)
}

/// Parses a size from `MIN` to `MAX` bytes, with or without a unit.
pub(super) fn size<const MIN: u64, const MAX: u64>(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize =
        text.parse().map_err(|_| "expected a size such as 256MiB or 1GiB".to_owned())?;
    match size.as_u64() {
        bytes if bytes < MIN => Err(format!("it must be at least {}", ByteSize(MIN))),
        bytes if bytes > MAX => Err(format!("it must be at most {}", ByteSize(MAX))),
        _ => Ok(size),
    }
}

/// Parses a duration that is longer than zero.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    longer_than_zero(duration_or_zero(text)?)
}

/// Parses a duration with units, as durations are also written to the log. A number without one is
/// an error, except for 0: options are in seconds as well as in days.
pub(super) fn duration_or_zero(text: &str) -> Result<Duration, String> {
    duration_up_to(text, MAX_DURATION, "a year")
}

/// Parses a duration that is longer than zero, and at most as long as certificates last.
pub(super) fn validity(text: &str) -> Result<Duration, String> {
    longer_than_zero(duration_up_to(text, MAX_VALIDITY, "36500 days")?)
}

fn longer_than_zero(duration: Duration) -> Result<Duration, String> {
    match duration {
        Duration::ZERO => Err("it must be longer than zero".to_owned()),
        duration => Ok(duration),
    }
}

fn duration_up_to(text: &str, most: Duration, in_words: &str) -> Result<Duration, String> {
    const EXPECTED: &str = "expected a duration such as 30s, 2min or 1h 30min";
    let too_long = || format!("it must be at most {in_words}");
    match humantime::parse_duration(text) {
        Ok(duration) if duration > most => Err(too_long()),
        Ok(duration) => Ok(duration),
        Err(DurationError::NumberOverflow) => Err(too_long()),
        Err(_) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
            Err(format!("a number needs a unit, such as {text}s, {text}min or {text}d"))
        }
        Err(_) => Err(EXPECTED.to_owned()),
    }
}

pub(super) fn unix_time(text: &str) -> Result<Timestamp, String> {
    humantime::parse_rfc3339_weak(text)
        .map(Timestamp::from)
        .map_err(|_| "expected a time in UTC such as 2027-01-31T18:00:00Z".to_owned())
}

/// Validates a subject's common name, which may be any text.
pub(crate) fn validate_common_name(text: &str) -> Result<String, String> {
    check_characters(text)?;
    let length = text.chars().count();
    if length > MAX_COMMON_NAME_CHARS {
        return Err(format!(
            "a common name has at most {MAX_COMMON_NAME_CHARS} characters, not {length}"
        ));
    }
    Ok(text.to_owned())
}

/// Rejects characters that can't be seen, since they make different names look the same.
pub(crate) fn check_characters(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("a name can't be empty".to_owned());
    }
    if text.len() > MAX_NAME_BYTES {
        return Err(format!("a name has at most {MAX_NAME_BYTES} bytes, not {}", text.len()));
    }
    if text.trim() != text {
        return Err("a name can't begin or end with a space".to_owned());
    }
    match text.chars().find(|&character| escape::is_hidden(character)) {
        Some(character) => Err(format!("{character:?} can't be in a name")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn durations_are_parsed_as_people_write_them() {
        for (text, seconds) in [
            ("30s", 30),
            ("30 s", 30),
            ("30sec", 30),
            ("1m30s", 90),
            ("1min 30s", 90),
            ("1h 30min", 5400),
            ("2 minutes", 120),
            ("30d", 30 * 24 * 3600),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(duration_or_zero("0"), Ok(Duration::ZERO));
        assert_eq!(duration_or_zero("0s"), Ok(Duration::ZERO));
        // What the log shows can be written into the configuration.
        let shown = humantime::format_duration(Duration::from_secs(99)).to_string();
        assert_eq!(duration(&shown), Ok(Duration::from_secs(99)));
    }

    #[test]
    fn validity_may_be_as_long_as_certificates_last() {
        for (text, days) in [("400d", 400), ("10y", 3652), ("36500d", 36_500)] {
            let validity = validity(text).unwrap();
            assert_eq!(validity.as_secs() / (24 * 3600), days, "{text}");
        }
        assert!(validity("36501d").unwrap_err().contains("at most 36500 days"));
        assert!(validity("0").unwrap_err().contains("longer than zero"));
    }

    #[test]
    fn invalid_durations_say_what_to_write() {
        for (text, expected) in [
            ("30", "30s"),
            ("0", "longer than zero"),
            ("", "30s"),
            ("abc", "30s"),
            ("-5s", "30s"),
            ("1h30", "1h 30min"),
            ("2 fortnights", "30s"),
            ("3y", "at most a year"),
            ("99999999999999999999s", "at most a year"),
        ] {
            let error = duration(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn numbers_and_sizes_say_what_they_expect() {
        for text in ["abc", "", "-1", "0", "1.5", "5000000000", "0x10", " 1"] {
            let error = number::<NonZeroU32, 1, MAX_COUNT>(text).unwrap_err();
            assert_eq!(error, "expected a whole number from 1 to 1000000", "{text}");
        }
        for text in ["abc", "", "5 apples"] {
            let error = size::<0, 1>(text).unwrap_err();
            assert_eq!(error, "expected a size such as 256MiB or 1GiB", "{text}");
        }
    }
}
