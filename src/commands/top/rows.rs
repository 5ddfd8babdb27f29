//! Builds the rows of both tables, exports and connections, in sorted order.

use std::collections::HashMap;

use super::figures::{bytes, clean, count, duration, latency, per_second, quantile, rate, rise};
use super::lines::{Column, Style};
use super::status::{Connection, Export, Status};
use super::view::{Picture, Sort};

/// Sort key of a row.
struct Key {
    rate: f64,
    requests: f64,
    errors: u64,
    name: String,
}

impl Key {
    fn order(&self, other: &Self, sort: Sort) -> std::cmp::Ordering {
        let first = match sort {
            Sort::Rate => other.rate.total_cmp(&self.rate),
            Sort::Requests => other.requests.total_cmp(&self.requests),
            Sort::Errors => other.errors.cmp(&self.errors),
            Sort::Name => std::cmp::Ordering::Equal,
        };
        first.then_with(|| self.name.cmp(&other.name))
    }
}

/// Returns the columns of the export table, with rows in the order of `sort`.
pub(super) fn export_columns(picture: &Picture<'_>, now: &Status, sort: Sort) -> Vec<Column> {
    let before: HashMap<&str, &Export> = picture
        .before
        .iter()
        .flat_map(|(before, _)| &before.exports)
        .map(|export| (export.name.as_str(), export))
        .collect();
    let mut rows: Vec<(Key, &Export)> = now
        .exports
        .iter()
        .map(|export| {
            let was = before.get(export.name.as_str());
            let key = Key {
                rate: pace(picture, export.bytes, was.map(|was| was.bytes)),
                requests: pace(picture, export.requests(), was.map(|was| was.requests())),
                errors: export.errors,
                name: clean(&export.name),
            };
            (key, export)
        })
        .collect();
    rows.sort_by(|(a, _), (b, _)| a.order(b, sort));
    let quantile = |part| {
        figures(&rows, |(_, export)| {
            let was = before.get(export.name.as_str()).map(|was| &was.read_seconds);
            quantile(&export.read_seconds, was, part).map_or("–".to_owned(), latency)
        })
    };
    vec![
        Column::words("NAME", 0, rows.iter().map(|(key, _)| key.name.clone()).collect()),
        Column::figures(
            "SIZE",
            2,
            figures(&rows, |(_, export)| export.size.map_or("–".to_owned(), bytes)),
        ),
        Column::figures("READERS", 1, figures(&rows, |(_, export)| count(export.readers))),
        Column::figures("RATE", 0, figures(&rows, |(key, _)| paced(picture, rate, key.rate))),
        Column::figures(
            "REQUESTS",
            3,
            figures(&rows, |(key, _)| paced(picture, per_second, key.requests)),
        ),
        Column::figures("P50", 4, quantile(0.5)),
        Column::figures("P99", 4, quantile(0.99)),
        Column::figures("IN ALL", 5, figures(&rows, |(_, export)| bytes(export.bytes))),
        errors(rows.iter().map(|(key, _)| key.errors)),
    ]
}

/// Returns the columns of the connection table, with rows in the order of `sort`.
pub(super) fn connection_columns(picture: &Picture<'_>, now: &Status, sort: Sort) -> Vec<Column> {
    let before: HashMap<u64, &Connection> = picture
        .before
        .iter()
        .flat_map(|(before, _)| &before.connections)
        .map(|connection| (connection.id, connection))
        .collect();
    let mut rows: Vec<(Key, &Connection)> = now
        .connections
        .iter()
        .map(|connection| {
            let was = before.get(&connection.id);
            let key = Key {
                rate: pace(picture, connection.bytes, was.map(|was| was.bytes)),
                requests: pace(picture, connection.requests, was.map(|was| was.requests)),
                errors: connection.errors,
                name: who(connection),
            };
            (key, connection)
        })
        .collect();
    rows.sort_by(|(a, one), (b, other)| a.order(b, sort).then(one.id.cmp(&other.id)));
    let words = |text: fn(&Connection) -> String| {
        rows.iter().map(|(_, connection)| text(connection)).collect()
    };
    let known = |text: &Option<String>| text.as_deref().map_or("–".to_owned(), clean);
    vec![
        Column::words("WHO", 0, rows.iter().map(|(key, _)| key.name.clone()).collect()),
        Column::words(
            "FROM",
            1,
            words(|connection| match &connection.via {
                Some(via) => format!("{} via {}", clean(&connection.peer), clean(via)),
                None => clean(&connection.peer),
            }),
        ),
        Column::words("EXPORT", 2, rows.iter().map(|(_, row)| known(&row.export)).collect()),
        Column::words("STATE", 6, words(|connection| clean(&connection.state))),
        Column::words("TLS", 5, rows.iter().map(|(_, row)| known(&row.tls)).collect()),
        Column::figures("SINCE", 4, figures(&rows, |(_, row)| duration(now.now - row.since))),
        Column::figures("RATE", 0, figures(&rows, |(key, _)| paced(picture, rate, key.rate))),
        Column::figures(
            "REQUESTS",
            3,
            figures(&rows, |(key, _)| paced(picture, per_second, key.requests)),
        ),
        Column::figures("IN FLIGHT", 7, figures(&rows, |(_, row)| count(row.in_flight))),
        Column::figures("IN ALL", 7, figures(&rows, |(_, row)| bytes(row.bytes))),
        errors(rows.iter().map(|(key, _)| key.errors)),
    ]
}

fn who(connection: &Connection) -> String {
    match &connection.identity {
        Some(identity) => clean(identity),
        None if connection.state == "negotiating" => "not known yet".to_owned(),
        None => "no certificate".to_owned(),
    }
}

fn figures<T>(rows: &[T], text: impl Fn(&T) -> String) -> Vec<(Style, String)> {
    rows.iter().map(|row| (Style::Plain, text(row))).collect()
}

fn errors(counts: impl Iterator<Item = u64>) -> Column {
    let style = |many| if many > 0 { Style::Bad } else { Style::Plain };
    Column::figures("ERRORS", 1, counts.map(|many| (style(many), count(many))).collect())
}

/// Returns the increase of a counter per second; 0 without an earlier answer.
#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn pace(picture: &Picture<'_>, now: u64, before: Option<u64>) -> f64 {
    let Some((_, seconds)) = picture.before else { return 0.0 };
    rise(now, before.unwrap_or(0)) as f64 / seconds
}

/// Formats a rate; a dash without an earlier answer to derive it from.
fn paced(picture: &Picture<'_>, text: fn(f64) -> String, value: f64) -> String {
    picture.before.map_or("–".to_owned(), |_| text(value))
}
