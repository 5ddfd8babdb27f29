//! Turns two answers of the server into the lines to show. Pure, so that it can be tested.

use std::cmp::Reverse;
use std::collections::HashMap;

use nbd_gateway::{ExportReport, LabelCounts};

use super::format::{
    bytes, duration, escape_untrusted, format_count, increase, per_second, percent, rate,
};
use super::lines::{Style, StyledLine, flow, table, width, wrap};
use super::rows::{connection_columns, export_columns, total_requests};
use super::stores::stores;
use crate::monitor::Status;

const DAY: f64 = 86_400.0;

/// Data to show.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    /// Latest answer; `None` before the first.
    pub(super) latest: Option<&'a Status>,
    /// Earlier answer of the same process, and the seconds between the two.
    pub(super) earlier: Option<(&'a Status, f64)>,
    /// Bytes per second between consecutive answers, latest last.
    pub(super) rates: &'a [f64],
    /// Error of the last request, if it failed.
    pub(super) error: Option<String>,
}

/// Choices of the user.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ViewOptions {
    pub(super) sort: Sort,
    pub(super) show: TableSelection,
    /// Number of rows above the first one shown.
    pub(super) skip: usize,
}

/// Sort order of the tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Rate,
    Requests,
    Errors,
    Name,
}

/// Selection of the tables shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum TableSelection {
    #[default]
    Both,
    Exports,
    Connections,
}

impl ViewOptions {
    /// Scrolls down by `rows`, at most to the last of `all` rows.
    pub(super) fn scroll_down(self, rows: usize, all: usize) -> Self {
        Self { skip: self.skip.saturating_add(rows).min(all.saturating_sub(1)), ..self }
    }

    /// Scrolls up by `rows`.
    pub(super) fn scroll_up(self, rows: usize) -> Self {
        Self { skip: self.skip.saturating_sub(rows), ..self }
    }
}

impl Sort {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Rate => Self::Requests,
            Self::Requests => Self::Errors,
            Self::Errors => Self::Name,
            Self::Name => Self::Rate,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Requests => "requests",
            Self::Errors => "errors",
            Self::Name => "name",
        }
    }
}

impl TableSelection {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Both => Self::Exports,
            Self::Exports => Self::Connections,
            Self::Connections => Self::Both,
        }
    }
}

/// Returns the number of rows of the table that can be scrolled.
pub(super) fn scrollable_rows(frame: &Frame<'_>, choice: &ViewOptions) -> usize {
    match (frame.latest, choice.show) {
        (None, _) => 0,
        (Some(now), TableSelection::Exports) => now.gateway.exports.len(),
        (Some(now), TableSelection::Both | TableSelection::Connections) => {
            now.gateway.connections.len()
        }
    }
}

/// Builds the whole screen: `height` lines of at most `columns` characters.
pub(super) fn screen(
    frame: &Frame<'_>,
    choice: &ViewOptions,
    columns: usize,
    height: usize,
) -> Vec<StyledLine> {
    let mut lines = head(frame, columns);
    // The tables get half of a small screen, however long the head is.
    lines.truncate((height / 2).max(2));
    let foot = StyledLine::styled(
        Style::Soft,
        format!("q quit   s sort: {}   e exports, connections   arrows scroll", choice.sort.name()),
    );
    if let Some(now) = frame.latest {
        if columns >= 40 {
            lines.push(sparkline(frame.rates, columns));
        }
        let room = height.saturating_sub(lines.len() + 1);
        lines.extend(tables(frame, now, choice, columns, room));
    }
    lines.truncate(height.saturating_sub(1));
    lines.resize(height.saturating_sub(1), StyledLine::default());
    lines.push(foot);
    lines.truncate(height);
    lines.into_iter().map(|line| line.cut(columns)).collect()
}

/// Builds the output for pipes: nothing is cut or left out.
pub(super) fn plain(frame: &Frame<'_>) -> Vec<StyledLine> {
    let mut lines = head(frame, 100);
    if let Some(now) = frame.latest {
        for (title, rows) in [
            (exports_title(now), export_columns(frame, now, Sort::Rate)),
            (connections_title(now), connection_columns(frame, now, Sort::Rate)),
        ] {
            lines.push(StyledLine::default());
            lines.push(StyledLine::styled(Style::Strong, title));
            lines.extend(table(rows, None));
        }
    }
    lines
}

fn head(frame: &Frame<'_>, columns: usize) -> Vec<StyledLine> {
    let mut lines = Vec::new();
    if let Some(now) = frame.latest {
        let mut facts = vec![
            (Style::Strong, format!("hexz-nbd {}", escape_untrusted(&now.version))),
            (Style::Soft, escape_untrusted(&now.gateway.listen.join(", "))),
            (Style::Plain, format!("up {}", duration(now.now - now.started))),
        ];
        if !now.ready {
            let why = now.unready.as_deref().map(|why| format!(": {}", escape_untrusted(why)));
            facts.push((Style::Warn, format!("not ready{}", why.unwrap_or_default())));
        }
        lines.extend(flow(facts, columns));
        // The facts say why it isn't ready.
        if let Some(worst) = now.problems.first().filter(|_| now.ready) {
            let style = if worst.severity == "critical" { Style::Bad } else { Style::Warn };
            let more = match now.problems.len() {
                1 => String::new(),
                all => format!(" (and {} more)", all - 1),
            };
            let text = format!("{}{more}", escape_untrusted(&worst.message));
            lines.extend(wrap(style, &text, columns));
        }
    }
    if let Some(error) = &frame.error {
        lines.extend(wrap(Style::Bad, &escape_untrusted(error), columns));
    }
    if let Some(now) = frame.latest {
        lines.extend(flow(traffic(frame, now), columns));
        for facts in stores(frame, now) {
            lines.extend(flow(facts, columns));
        }
        lines.extend(flow(problems(now), columns));
    }
    lines
}

#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn traffic(frame: &Frame<'_>, now: &Status) -> Vec<(Style, String)> {
    let mut facts = Vec::new();
    let total = &now.gateway.connections_total;
    if let Some((before, seconds)) = frame.earlier {
        let read = total_increase(now, before, |export| export.bytes);
        let requests = total_increase(now, before, total_requests);
        facts.push((Style::Strong, format!("read {}", rate(read as f64 / seconds))));
        facts.push((Style::Plain, format!("requests {}", per_second(requests as f64 / seconds))));
    }
    facts.push((
        Style::Plain,
        format!(
            "{} reading, {} negotiating",
            format_count(total.reading),
            format_count(total.negotiating)
        ),
    ));
    let then = frame.earlier.map(|(before, _)| (before.cache.hits, before.cache.misses));
    let (hits, misses) = then.unwrap_or_default();
    let (hits, misses) = (increase(now.cache.hits, hits), increase(now.cache.misses, misses));
    let all = hits.saturating_add(misses);
    if all > 0 {
        let part = hits as f64 / all as f64;
        facts.push((Style::Plain, format!("cache hits {}", percent(part))));
    }
    facts.push((
        Style::Plain,
        format!("cache {} of {}", bytes(now.cache.bytes), bytes(now.cache.capacity)),
    ));
    if let Some(resident) = now.memory.resident {
        let text = format!("resident {} of {}", bytes(resident), bytes(now.memory.budget));
        facts.push((Style::Plain, text));
    }
    if let Some(expires) = now.gateway.tls.as_ref().and_then(|tls| tls.certificate_expires) {
        facts.push(match expires - now.now {
            left if left <= 0.0 => (Style::Bad, "certificate expired".to_owned()),
            left if left < 7.0 * DAY => (Style::Bad, certificate(left)),
            left if left < 30.0 * DAY => (Style::Warn, certificate(left)),
            left => (Style::Plain, certificate(left)),
        });
    }
    facts.extend(client_certificates(now));
    facts
}

/// Names the client whose certificate expires first, if that is soon, and the number of others.
fn client_certificates(now: &Status) -> Option<(Style, String)> {
    let clients = &now.gateway.client_certificates;
    let first = clients.expiring.first()?;
    let (left, identity) = (first.expires - now.now, escape_untrusted(&first.identity));
    let (style, mut text) = if left <= 0.0 {
        (Style::Bad, format!("client certificate of {identity} expired"))
    } else {
        let text = format!("client certificate of {identity} expires in {}", duration(left));
        (Style::Warn, text)
    };
    let others = (clients.expires_soon + clients.expired).saturating_sub(1);
    if others > 0 {
        text += &format!(" ({} more)", format_count(others));
    }
    Some((style, text))
}

fn certificate(left: f64) -> String {
    format!("certificate expires in {}", duration(left))
}

/// Lists refusals and failures since the start.
fn problems(now: &Status) -> Vec<(Style, String)> {
    let total = &now.gateway.connections_total;
    let mut facts = Vec::new();
    for (style, what, counts) in [
        (Style::Soft, "refused", &total.refused),
        (Style::Soft, "failed", &total.failed),
        (Style::Soft, "TLS", &total.handshake_failures),
        (Style::Bad, "unreadable blocks", &now.verification_failures),
        (Style::Bad, "unreadable archives", &now.open_failures),
    ] {
        if let Some(text) = reasons(counts) {
            facts.push((style, format!("{what}: {text}")));
        }
    }
    if now.gateway.reloads.failed > 0 {
        let why = now
            .gateway
            .reloads
            .last_error
            .as_deref()
            .map(|why| format!(", last error: {}", escape_untrusted(why)));
        let text = format!(
            "failed reloads: {}{}",
            format_count(now.gateway.reloads.failed),
            why.unwrap_or_default()
        );
        facts.push((Style::Warn, text));
    }
    if let Some(audit) = &now.audit
        && audit.lost > 0
    {
        facts.push((Style::Bad, format!("lost audit events: {}", format_count(audit.lost))));
    }
    if let Some(error) = now.recent_errors.first() {
        let ago = duration(now.now - error.at);
        facts.push((
            Style::Soft,
            format!("last error, {ago} ago: {}", escape_untrusted(&error.message)),
        ));
    }
    facts
}

/// Formats reasons with their counts, most frequent first; `None` if all counts are zero.
fn reasons(counts: &LabelCounts) -> Option<String> {
    let mut counts: Vec<(&str, u64)> = counts
        .iter()
        .map(|(reason, many)| (&**reason, *many))
        .filter(|(_, many)| *many > 0)
        .collect();
    counts.sort_by_key(|(_, many)| Reverse(*many));
    let each = counts
        .iter()
        .map(|(reason, many)| format!("{} {}", escape_untrusted(reason), format_count(*many)));
    (!counts.is_empty()).then(|| each.collect::<Vec<_>>().join(", "))
}

/// Draws the latest rates as bars, scaled to the highest one.
fn sparkline(rates: &[f64], columns: usize) -> StyledLine {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = rates.iter().copied().fold(0.0, f64::max);
    let note = format!(" max {}", rate(most));
    let room = columns.saturating_sub(width(&note));
    let shown = rates.iter().skip(rates.len().saturating_sub(room));
    let bars: String = shown
        .map(|value| {
            let reached = LEVELS
                .iter()
                .zip(1_u8..)
                .take_while(|(_, level)| *level == 1 || value * 8.0 > most * f64::from(*level - 1));
            reached.last().map_or(' ', |(bar, _)| *bar)
        })
        .collect();
    let mut line = StyledLine::styled(Style::Plain, bars);
    line.push(Style::Soft, note);
    line
}

fn tables(
    frame: &Frame<'_>,
    now: &Status,
    choice: &ViewOptions,
    columns: usize,
    room: usize,
) -> Vec<StyledLine> {
    let exports = || {
        let rows = table(export_columns(frame, now, choice.sort), Some(columns));
        (exports_title(now), rows)
    };
    let connections = || {
        let rows = table(connection_columns(frame, now, choice.sort), Some(columns));
        (connections_title(now), rows)
    };
    match choice.show {
        TableSelection::Exports => visible_part(exports(), choice.skip, room),
        TableSelection::Connections => visible_part(connections(), choice.skip, room),
        TableSelection::Both => {
            let (exports, connections) = (exports(), connections());
            // Connections get half of the room, and whatever exports leave of the rest.
            let wanted = connections.1.len() + 1;
            let above = (exports.1.len() + 1).min(room.saturating_sub(wanted.min(room / 2)));
            let mut lines = visible_part(exports, 0, above);
            lines.extend(visible_part(connections, choice.skip, room.saturating_sub(above)));
            lines
        }
    }
}

/// Returns the title, the header and as many rows as fit, after skipping `skip` rows.
fn visible_part(
    (title, lines): (String, Vec<StyledLine>),
    skip: usize,
    room: usize,
) -> Vec<StyledLine> {
    let mut lines = lines.into_iter();
    let head = lines.next().unwrap_or_default();
    let rows = lines.len();
    let fit = room.saturating_sub(2);
    // Don't scroll beyond the last row.
    let skip = skip.min(rows.saturating_sub(fit));
    let hidden = rows.saturating_sub(skip + fit);
    let mut first = StyledLine::styled(Style::Strong, title);
    if skip > 0 || hidden > 0 {
        first.push(Style::Soft, format!("   {skip} more above, {hidden} below"));
    }
    [first, head].into_iter().chain(lines.skip(skip)).take(room).collect()
}

fn exports_title(now: &Status) -> String {
    format!("EXPORTS {}", count_of(now.gateway.exports.len()))
}

fn connections_title(now: &Status) -> String {
    let total = now
        .gateway
        .connections_total
        .reading
        .saturating_add(now.gateway.connections_total.negotiating);
    let listed = count_of(now.gateway.connections.len());
    match total.saturating_sub(u64::try_from(now.gateway.connections.len()).unwrap_or(u64::MAX)) {
        0 => format!("CONNECTIONS {listed}"),
        more => format!("CONNECTIONS {listed}, {} not listed", format_count(more)),
    }
}

fn count_of(length: usize) -> String {
    format_count(u64::try_from(length).unwrap_or(u64::MAX))
}

/// Returns the increase of a counter, summed over all exports. An export that wasn't listed before
/// doesn't count: its total may be older than the earlier answer.
pub(super) fn total_increase(
    now: &Status,
    before: &Status,
    of: impl Fn(&ExportReport) -> u64,
) -> u64 {
    let before: HashMap<&str, u64> =
        before.gateway.exports.iter().map(|export| (export.name.as_str(), of(export))).collect();
    now.gateway.exports.iter().fold(0_u64, |sum, export| {
        let was = before.get(export.name.as_str());
        sum.saturating_add(was.map_or(0, |was| increase(of(export), *was)))
    })
}
