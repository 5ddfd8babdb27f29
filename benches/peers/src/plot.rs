//! Plots, as SVG: bars with their figures, on white, so that they can be read on any page.

mod bars;

use std::path::Path;

use anyhow::{Context, Result};

use crate::bench::LoadClient;
use crate::cases::Case;
use crate::row::{Aim, Figure, Row, Unit};
use crate::table::Report;
use bars::{Bar, BarChart, Part};

const OURS: &str = "#1f6fb2";
/// For rows that are lost: as dark as [`OURS`], and of a hue that everybody can tell from it.
const LOST: &str = "#c2500a";
const OTHERS: &str = "#8a8f98";
/// For parts of a bar, told apart by lightness as well as by hue.
const PARTS: [&str; 4] = ["#12436d", "#28a197", "#f0a030", "#801650"];

/// Draws what there is to be drawn; of what hasn't been measured there is no plot.
pub(crate) fn write(report: &Report, folder: &Path) -> Result<()> {
    let charts = [
        ("ratios.svg", ratios(report)),
        ("processor-time.svg", processor_time(report)),
        ("latency.svg", latency(report)),
    ];
    for (name, chart) in charts {
        if !chart.is_empty() {
            let file = folder.join(name);
            svg::save(&file, &chart.draw()).with_context(|| format!("write {}", file.display()))?;
        }
    }
    Ok(())
}

/// Returns the ratios between its rates and those of its peers, with fio as the client.
fn ratios(report: &Report) -> BarChart {
    const CASES: [Case; 4] =
        [Case::RandomWarm, Case::SequentialCold, Case::SequentialWarm, Case::RandomCold];
    let client = format!(", {}", LoadClient::Fio.name());
    let rows = CASES.iter().flat_map(|case| report.rows(*case));
    let is_rate = |row: &&Row| {
        row.ours
            .is_some_and(|figure| matches!(figure.unit, Unit::ReadsPerSecond | Unit::MibPerSecond))
            && row.what.ends_with(&client)
    };
    let bars = rows.filter(is_rate).filter_map(|row| {
        let (ours, theirs, ratio) = (row.ours?, row.theirs?, row.ratio?);
        let colour = if ratio < 1.0 { LOST } else { OURS };
        Some(Bar {
            label: row.what.strip_suffix(&client).unwrap_or(&row.what).to_owned(),
            detail: format!("{ours}; {}: {theirs}", row.other),
            parts: vec![Part { value: ratio, colour }],
            text: format!("{ratio:.2} ×"),
            text_colour: colour,
            mark: match row.aim {
                Some(Aim::AtLeast(aim) | Aim::AtMost(aim)) => Some(aim),
                None => None,
            },
        })
    });
    BarChart {
        title: "hexz-nbd on a compressed archive, compared with its peers".to_owned(),
        axis: "times the peer's rate, read by fio (logarithmic axis)".to_owned(),
        is_logarithmic: true,
        legend: vec![
            ("faster than the peer".to_owned(), OURS),
            ("slower than the peer".to_owned(), LOST),
        ],
        bars: bars.collect(),
    }
}

/// Where the time goes when everything has to be decoded.
fn processor_time(report: &Report) -> BarChart {
    let rows = report.rows(Case::SequentialCold);
    let mut bars = Vec::new();
    let mut legend = Vec::new();
    if let Some(row) = rows.iter().find(|row| !row.parts.is_empty()) {
        legend
            .extend(row.parts.iter().zip(PARTS).map(|((name, _), colour)| (name.clone(), colour)));
        let parts = row.parts.iter().zip(PARTS);
        let parts = parts.map(|((_, seconds), colour)| Part { value: *seconds, colour });
        bars.extend(
            row.theirs.map(|sum| bar("the parts alone, each on one thread", sum, parts.collect())),
        );
    }
    // The first rows are for TLS and fio.
    for (number, row) in rows.iter().take_while(|row| row.parts.is_empty()).enumerate() {
        let whole = |label: &str, figure: Figure, colour| {
            bar(label, figure, vec![Part { value: figure.value, colour }])
        };
        let ours = row.our_cpu.filter(|_| number == 0);
        bars.extend(ours.map(|figure| whole("hexz-nbd, TLS, cold", figure, OURS)));
        bars.extend(row.their_cpu.map(|figure| whole(&row.other, figure, OTHERS)));
    }
    BarChart {
        title: "Processor time of the server: 256 KiB in order, cold, TLS 1.3".to_owned(),
        axis: "seconds for each GiB that is read".to_owned(),
        is_logarithmic: false,
        legend,
        bars,
    }
}

fn bar(label: &str, figure: Figure, parts: Vec<Part>) -> Bar {
    let (label, text) = (label.to_owned(), figure.to_string());
    Bar { label, detail: String::new(), parts, text, text_colour: bars::INK, mark: None }
}

/// What a client that reads a lot does to others.
fn latency(report: &Report) -> BarChart {
    let bars = report.rows(Case::Latency).iter().filter_map(|row| {
        let percentile = row.what.rsplit(": ").next()?.to_owned();
        let milliseconds = |figure: Figure| figure.value * 1e3;
        let one = |label: String, figure: Figure, colour| {
            let parts = vec![Part { value: milliseconds(figure), colour }];
            bar(&label, figure, parts)
        };
        let (beside, alone) = (row.ours?, row.theirs?);
        Some([
            one(format!("{percentile}, alone"), alone, OTHERS),
            one(format!("{percentile}, beside a cold reader"), beside, OURS),
        ])
    });
    BarChart {
        title: "Latency of 4 KiB reads at half load".to_owned(),
        axis: "milliseconds from when a read was due until its answer was there".to_owned(),
        is_logarithmic: false,
        legend: Vec::new(),
        bars: bars.flatten().collect(),
    }
}
