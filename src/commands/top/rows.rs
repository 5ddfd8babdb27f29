//! Builds the rows of both tables, exports and connections, in sorted order.

use std::collections::HashMap;

use nbd_gateway::{ConnectionReport, ExportReport};
use nbd_server::RequestCounts;

use super::format::{
    bytes, duration, escape_untrusted, format_count, increase, per_second, quantile, rate,
};
use super::lines::{Column, Style};
use super::view::{Frame, Sort};
use crate::commands::output::format_seconds;
use crate::monitor::Status;

/// Shown where there is no value.
const DASH: &str = "–";

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
pub(super) fn export_columns(frame: &Frame<'_>, now: &Status, sort: Sort) -> Vec<Column> {
    let before: HashMap<&str, &ExportReport> = frame
        .earlier
        .iter()
        .flat_map(|(before, _)| &before.gateway.exports)
        .map(|export| (export.name.as_str(), export))
        .collect();
    let mut rows: Vec<Row<'_, ExportReport>> = now
        .gateway
        .exports
        .iter()
        .map(|export| {
            let was = before.get(export.name.as_str());
            let key = SortKey {
                // The total of an export that wasn't listed may be older than the earlier answer.
                rate: was.map_or(0.0, |was| increase_per_second(frame, export.bytes, was.bytes)),
                requests: was.map_or(0.0, |was| {
                    increase_per_second(frame, total_requests(export), total_requests(was))
                }),
                errors: export.errors,
                name: escape_untrusted(&export.name),
            };
            (key, export)
        })
        .collect();
    rows.sort_by(|(a, _), (b, _)| a.order(b, sort));
    let quantile = |export: &ExportReport, part| {
        let was = before.get(export.name.as_str()).map(|was| &was.read_seconds);
        quantile(&export.read_seconds, was, part).map_or(DASH.to_owned(), format_seconds)
    };
    let size = |size: Option<u64>| size.map_or(DASH.to_owned(), bytes);
    vec![
        text(&rows, "NAME", 0, |key, _| key.name.clone()),
        numbers(&rows, "SIZE", 2, |_, it| size(it.size)),
        numbers(&rows, "READERS", 1, |_, it| format_count(it.readers)),
        numbers(&rows, "RATE", 0, |key, _| if_known(frame, rate, key.rate)),
        numbers(&rows, "REQUESTS", 3, |key, _| if_known(frame, per_second, key.requests)),
        numbers(&rows, "READ P50", 4, |_, it| quantile(it, 0.5)),
        numbers(&rows, "P99", 4, |_, it| quantile(it, 0.99)),
        numbers(&rows, "TOTAL READ", 5, |_, it| bytes(it.bytes)),
        errors(&rows),
    ]
}

/// Returns the columns of the connection table, with rows in the order of `sort`.
pub(super) fn connection_columns(frame: &Frame<'_>, now: &Status, sort: Sort) -> Vec<Column> {
    let before: HashMap<u64, &ConnectionReport> = frame
        .earlier
        .iter()
        .flat_map(|(before, _)| &before.gateway.connections)
        .map(|connection| (connection.id, connection))
        .collect();
    let mut rows: Vec<Row<'_, ConnectionReport>> = now
        .gateway
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
    let optional = |text: Option<&str>| text.map_or(DASH.to_owned(), escape_untrusted);
    vec![
        text(&rows, "IDENTITY", 0, |key, _| key.name.clone()),
        text(&rows, "PEER", 1, |_, it| match &it.via {
            Some(via) => format!("{} via {}", escape_untrusted(&it.peer), escape_untrusted(via)),
            None => escape_untrusted(&it.peer),
        }),
        text(&rows, "EXPORT", 2, |_, it| optional(it.export.as_deref())),
        text(&rows, "STATE", 6, |_, it| escape_untrusted(&it.state)),
        text(&rows, "TLS", 5, |_, it| escape_untrusted(it.tls.as_deref().unwrap_or("none"))),
        numbers(&rows, "DURATION", 4, |_, it| duration(now.now - it.since)),
        numbers(&rows, "RATE", 0, |key, _| if_known(frame, rate, key.rate)),
        numbers(&rows, "REQUESTS", 3, |key, _| if_known(frame, per_second, key.requests)),
        numbers(&rows, "IN FLIGHT", 7, |_, it| format_count(it.in_flight)),
        numbers(&rows, "TOTAL READ", 7, |_, it| bytes(it.bytes)),
        errors(&rows),
    ]
}

/// Returns the number of requests of all kinds. It may have any value, so the sum must not overflow.
pub(super) fn total_requests(export: &ExportReport) -> u64 {
    let RequestCounts { read, block_status, cache, other } = export.requests;
    [read, block_status, cache, other].into_iter().fold(0, u64::saturating_add)
}

fn format_identity(connection: &ConnectionReport) -> String {
    match &connection.identity {
        Some(identity) => escape_untrusted(identity),
        None if connection.state == "negotiating" => "unknown yet".to_owned(),
        None => "no certificate".to_owned(),
    }
}

/// A row of a table: its sort key, and the export or connection.
type Row<'a, T> = (SortKey, &'a T);

fn text<T>(
    rows: &[Row<'_, T>],
    title: &'static str,
    removal_rank: u8,
    cell: impl Fn(&SortKey, &T) -> String,
) -> Column {
    Column::text(title, removal_rank, rows.iter().map(|(key, row)| cell(key, row)).collect())
}

fn numbers<T>(
    rows: &[Row<'_, T>],
    title: &'static str,
    removal_rank: u8,
    cell: impl Fn(&SortKey, &T) -> String,
) -> Column {
    let cells = rows.iter().map(|(key, row)| (Style::Plain, cell(key, row)));
    Column::numbers(title, removal_rank, cells.collect())
}

fn errors<T>(rows: &[Row<'_, T>]) -> Column {
    let cell = |count| (if count > 0 { Style::Bad } else { Style::Plain }, format_count(count));
    Column::numbers("ERRORS", 1, rows.iter().map(|(key, _)| cell(key.errors)).collect())
}

/// Returns the increase of a counter per second; 0 without an earlier answer.
#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn increase_per_second(frame: &Frame<'_>, now: u64, before: u64) -> f64 {
    let Some((_, seconds)) = frame.earlier else { return 0.0 };
    increase(now, before) as f64 / seconds
}

/// Formats a rate; a dash without an earlier answer to derive it from.
fn if_known(frame: &Frame<'_>, text: fn(f64) -> String, value: f64) -> String {
    frame.earlier.map_or(DASH.to_owned(), |_| text(value))
}
