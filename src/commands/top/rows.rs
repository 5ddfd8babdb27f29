//! Builds the rows of both tables, exports and connections, in sorted order.

use std::collections::HashMap;

use super::format::{
    bytes, duration, escape_untrusted, format_count, increase, latency, per_second, quantile, rate,
};
use super::lines::{Column, Style};
use super::status::{Connection, Export, ServerStatus};
use super::view::{Frame, Sort};

/// Sort key of a row.
struct SortKey {
    rate: f64,
    requests: f64,
    errors: u64,
    name: String,
}

impl SortKey {
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
pub(super) fn export_columns(frame: &Frame<'_>, now: &ServerStatus, sort: Sort) -> Vec<Column> {
    let before: HashMap<&str, &Export> = frame
        .earlier
        .iter()
        .flat_map(|(before, _)| &before.exports)
        .map(|export| (export.name.as_str(), export))
        .collect();
    let mut rows: Vec<(SortKey, &Export)> = now
        .exports
        .iter()
        .map(|export| {
            let was = before.get(export.name.as_str());
            let key = SortKey {
                // The total of an export that wasn't listed may be older than the earlier answer.
                rate: was.map_or(0.0, |was| increase_per_second(frame, export.bytes, was.bytes)),
                requests: was.map_or(0.0, |was| {
                    increase_per_second(frame, export.total_requests(), was.total_requests())
                }),
                errors: export.errors,
                name: escape_untrusted(&export.name),
            };
            (key, export)
        })
        .collect();
    rows.sort_by(|(a, _), (b, _)| a.order(b, sort));
    let quantile = |part| {
        number_cells(&rows, |(_, export)| {
            let was = before.get(export.name.as_str()).map(|was| &was.read_seconds);
            quantile(&export.read_seconds, was, part).map_or("–".to_owned(), latency)
        })
    };
    vec![
        Column::text("NAME", 0, rows.iter().map(|(key, _)| key.name.clone()).collect()),
        Column::numbers(
            "SIZE",
            2,
            number_cells(&rows, |(_, export)| export.size.map_or("–".to_owned(), bytes)),
        ),
        Column::numbers(
            "READERS",
            1,
            number_cells(&rows, |(_, export)| format_count(export.readers)),
        ),
        Column::numbers(
            "RATE",
            0,
            number_cells(&rows, |(key, _)| format_rate_if_known(frame, rate, key.rate)),
        ),
        Column::numbers(
            "REQUESTS",
            3,
            number_cells(&rows, |(key, _)| format_rate_if_known(frame, per_second, key.requests)),
        ),
        Column::numbers("P50", 4, quantile(0.5)),
        Column::numbers("P99", 4, quantile(0.99)),
        Column::numbers("IN ALL", 5, number_cells(&rows, |(_, export)| bytes(export.bytes))),
        errors(rows.iter().map(|(key, _)| key.errors)),
    ]
}

/// Returns the columns of the connection table, with rows in the order of `sort`.
pub(super) fn connection_columns(frame: &Frame<'_>, now: &ServerStatus, sort: Sort) -> Vec<Column> {
    let before: HashMap<u64, &Connection> = frame
        .earlier
        .iter()
        .flat_map(|(before, _)| &before.connections)
        .map(|connection| (connection.id, connection))
        .collect();
    let mut rows: Vec<(SortKey, &Connection)> = now
        .connections
        .iter()
        .map(|connection| {
            let was = before.get(&connection.id);
            let key = SortKey {
                rate: increase_per_second(frame, connection.bytes, was.map_or(0, |was| was.bytes)),
                requests: increase_per_second(
                    frame,
                    connection.requests,
                    was.map_or(0, |was| was.requests),
                ),
                errors: connection.errors,
                name: format_identity(connection),
            };
            (key, connection)
        })
        .collect();
    rows.sort_by(|(a, one), (b, other)| a.order(b, sort).then(one.id.cmp(&other.id)));
    let words = |text: fn(&Connection) -> String| {
        rows.iter().map(|(_, connection)| text(connection)).collect()
    };
    let known = |text: &Option<String>| text.as_deref().map_or("–".to_owned(), escape_untrusted);
    vec![
        Column::text("WHO", 0, rows.iter().map(|(key, _)| key.name.clone()).collect()),
        Column::text(
            "FROM",
            1,
            words(|connection| match &connection.via {
                Some(via) => {
                    format!("{} via {}", escape_untrusted(&connection.peer), escape_untrusted(via))
                }
                None => escape_untrusted(&connection.peer),
            }),
        ),
        Column::text("EXPORT", 2, rows.iter().map(|(_, row)| known(&row.export)).collect()),
        Column::text("STATE", 6, words(|connection| escape_untrusted(&connection.state))),
        Column::text("TLS", 5, rows.iter().map(|(_, row)| known(&row.tls)).collect()),
        Column::numbers("SINCE", 4, number_cells(&rows, |(_, row)| duration(now.now - row.since))),
        Column::numbers(
            "RATE",
            0,
            number_cells(&rows, |(key, _)| format_rate_if_known(frame, rate, key.rate)),
        ),
        Column::numbers(
            "REQUESTS",
            3,
            number_cells(&rows, |(key, _)| format_rate_if_known(frame, per_second, key.requests)),
        ),
        Column::numbers(
            "IN FLIGHT",
            7,
            number_cells(&rows, |(_, row)| format_count(row.in_flight)),
        ),
        Column::numbers("IN ALL", 7, number_cells(&rows, |(_, row)| bytes(row.bytes))),
        errors(rows.iter().map(|(key, _)| key.errors)),
    ]
}

fn format_identity(connection: &Connection) -> String {
    match &connection.identity {
        Some(identity) => escape_untrusted(identity),
        None if connection.state == "negotiating" => "not known yet".to_owned(),
        None => "no certificate".to_owned(),
    }
}

fn number_cells<T>(rows: &[T], text: impl Fn(&T) -> String) -> Vec<(Style, String)> {
    rows.iter().map(|row| (Style::Plain, text(row))).collect()
}

fn errors(counts: impl Iterator<Item = u64>) -> Column {
    let style = |many| if many > 0 { Style::Bad } else { Style::Plain };
    Column::numbers("ERRORS", 1, counts.map(|many| (style(many), format_count(many))).collect())
}

/// Returns the increase of a counter per second; 0 without an earlier answer.
#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn increase_per_second(frame: &Frame<'_>, now: u64, before: u64) -> f64 {
    let Some((_, seconds)) = frame.earlier else { return 0.0 };
    increase(now, before) as f64 / seconds
}

/// Formats a rate; a dash without an earlier answer to derive it from.
fn format_rate_if_known(frame: &Frame<'_>, text: fn(f64) -> String, value: f64) -> String {
    frame.earlier.map_or("–".to_owned(), |_| text(value))
}
