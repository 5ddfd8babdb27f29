//! Deserializers for the values of options in a configuration file. They use the parsers of the
//! command line.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::ValueEnum;
use nbd_telemetry::escape;
use serde::de::{Deserialize, Deserializer, Error};

use super::{location, values};

/// A string or a number.
#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "expected a string or a number")]
enum Scalar {
    Text(String),
    Integer(i64),
    Float(f64),
}

/// One value, or an array of values.
#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
enum OneOrMany {
    One(Scalar),
    Many(Vec<Scalar>),
}

pub(super) fn text<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    parse(Scalar::deserialize(deserializer)?, T::from_str).map(Some)
}

pub(super) fn number<'de, D, T, const MIN: u32, const MAX: u32>(d: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u32>,
{
    parse(Scalar::deserialize(d)?, values::number::<T, MIN, MAX>)
}

/// Deserializes the number of an option without a default.
pub(super) fn optional_number<'de, D, T, const MIN: u32, const MAX: u32>(
    d: D,
) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u32>,
{
    number::<D, T, MIN, MAX>(d).map(Some)
}

pub(super) fn size<'de, D, T, const MIN: u64, const MAX: u64>(d: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: From<ByteSize>,
{
    parse(Scalar::deserialize(d)?, values::size::<MIN, MAX>).map(T::from)
}

pub(super) fn duration<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: From<Duration>,
{
    parse(Scalar::deserialize(deserializer)?, values::duration).map(T::from)
}

pub(super) fn duration_or_zero<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: From<Duration>,
{
    parse(Scalar::deserialize(deserializer)?, values::duration_or_zero).map(T::from)
}

/// Deserializes one of the possible values of an option.
pub(super) fn choice<'de, D: Deserializer<'de>, T: ValueEnum>(d: D) -> Result<T, D::Error> {
    let names = T::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let names: Vec<_> = names.map(|value| value.get_name().to_owned()).collect();
    let expected = |_| format!("expected {}", names.join(" or "));
    parse(Scalar::deserialize(d)?, |text| T::from_str(text, false).map_err(expected))
}

/// Deserializes one value, or an array of values.
pub(super) fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    parse_list(deserializer, T::from_str)
}

/// Deserializes the path or URL of a folder.
pub(super) fn folder<'de, D: Deserializer<'de>>(d: D) -> Result<Option<PathBuf>, D::Error> {
    parse(Scalar::deserialize(d)?, |text| location::folder(OsStr::new(text))).map(Some)
}

/// Deserializes the paths or URLs of folders.
pub(super) fn folders<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<PathBuf>, D::Error> {
    parse_list(d, |text| location::folder(OsStr::new(text)))
}

fn parse_list<'de, D, T, F>(
    deserializer: D,
    parse_one: impl Fn(&str) -> Result<T, F>,
) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    F: fmt::Display,
{
    let values = match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(value) => vec![value],
        OneOrMany::Many(values) => values,
    };
    if values.is_empty() {
        return Err(D::Error::custom("the array must not be empty; remove the key instead"));
    }
    values.into_iter().map(|value| parse(value, &parse_one)).collect()
}

/// Deserializes a list whose values may contain several, separated by commas.
pub(super) fn comma_list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let texts: Vec<String> = list(deserializer)?;
    let parts = texts.iter().flat_map(|text| text.split(','));
    parts.map(|part| parse(Scalar::Text(part.to_owned()), values::trimmed)).collect()
}

fn parse<T, F: fmt::Display, E: Error>(
    value: Scalar,
    parse: impl FnOnce(&str) -> Result<T, F>,
) -> Result<T, E> {
    let text = match value {
        Scalar::Text(text) => text,
        Scalar::Integer(number) => number.to_string(),
        Scalar::Float(number) => number.to_string(),
    };
    let describe = |error| format!("invalid value {:?}: {error}", escape::path(&text));
    parse(&text).map_err(|error| E::custom(describe(error)))
}
