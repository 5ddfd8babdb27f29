//! Bars from left to right, one below the other.

use svg::Document;
use svg::node::element::{Line, Rectangle, Text};

pub(super) struct BarChart {
    pub(super) title: String,
    /// What the numbers are, with their unit.
    pub(super) axis: String,
    /// Bars then begin at 1, and go to the left if they are shorter.
    pub(super) is_logarithmic: bool,
    /// Meanings of the colours, unless the labels give them.
    pub(super) legend: Vec<(String, &'static str)>,
    pub(super) bars: Vec<Bar>,
}

pub(super) struct Bar {
    /// Wrapped after commas if it is long.
    pub(super) label: String,
    /// Stands below the label, smaller; may be empty.
    pub(super) detail: String,
    pub(super) parts: Vec<Part>,
    /// Stands at the bar's end.
    pub(super) text: String,
    pub(super) text_colour: &'static str,
    /// The target, shown as a thin line.
    pub(super) mark: Option<f64>,
}

pub(super) struct Part {
    pub(super) value: f64,
    pub(super) colour: &'static str,
}

/// Lengths are in pixels.
const WIDTH: f64 = 940.0;
const MARGIN: f64 = 20.0;
/// Where the longest bar ends: its figure stands behind it.
const RIGHT: f64 = 840.0;
const TOP: f64 = 50.0;
const BAR: f64 = 20.0;
/// Between two bars, or their labels.
const GAP: f64 = 10.0;
const LEGEND: f64 = 26.0;
const BOTTOM: f64 = 50.0;
/// Between a label and the bars.
const PADDING: f64 = 12.0;

/// Sizes of the fonts.
const LABEL: f64 = 13.0;
const DETAIL: f64 = 10.5;
/// Width of a character, as part of its height. The page's font isn't known here; the letters of
/// wide ones, such as DejaVu Sans and Verdana, take somewhat less on average.
const CHARACTER: f64 = 0.56;
/// Characters of a line of a label, unless a single part of it is longer.
const LINE: usize = 48;

const LOGARITHMIC_TICKS: [f64; 14] =
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

pub(super) const INK: &str = "#222222";
const FAINT: &str = "#d5d8dc";

impl BarChart {
    pub(super) fn is_empty(&self) -> bool {
        self.bars.is_empty()
    }

    pub(super) fn draw(&self) -> Document {
        let has_legend = !self.legend.is_empty() || self.has_marks();
        let top = TOP + if has_legend { LEGEND } else { 0.0 };
        let bottom = top + self.bars.iter().map(Bar::height).sum::<f64>();
        let height = bottom + BOTTOM;
        let background = Rectangle::new().set("width", WIDTH).set("height", height);
        let axis = text(&self.axis, (self.left() + RIGHT) / 2.0, height - MARGIN + 6.0, 12.0);
        let mut document = Document::new()
            .set("viewBox", (0.0, 0.0, WIDTH, height))
            .set("width", WIDTH)
            .set("height", height)
            .set("font-family", "sans-serif")
            .set("role", "img")
            .add(svg::node::element::Title::new(self.title.as_str()))
            .add(background.set("fill", "white"))
            .add(text(&self.title, MARGIN, 30.0, 18.0).set("font-weight", "bold"))
            .add(axis.set("text-anchor", "middle"));
        document = self.draw_legend(document);
        for tick in self.ticks() {
            let x = self.x(tick);
            let label = text(&format!("{tick}"), x, bottom + 14.0, 11.0);
            document = document
                .add(line(x, top, bottom).set("stroke", FAINT))
                .add(label.set("text-anchor", "middle"));
        }
        let mut y = top;
        for bar in &self.bars {
            document = self.draw_bar(document, bar, y);
            y += bar.height();
        }
        document.add(line(self.x(self.origin()), top, bottom).set("stroke", INK))
    }

    fn draw_legend(&self, mut document: Document) -> Document {
        let mut x = MARGIN;
        for (name, colour) in &self.legend {
            document = document
                .add(rectangle(x, TOP - 2.0, 12.0, 12.0).set("fill", *colour))
                .add(text(name, x + 18.0, TOP + 9.0, LABEL));
            x += 40.0 + width_of(name, LABEL);
        }
        if self.has_marks() {
            document = document.add(mark(x + 6.0, TOP - 4.0, TOP + 12.0)).add(text(
                "target",
                x + 18.0,
                TOP + 9.0,
                LABEL,
            ));
        }
        document
    }

    fn draw_bar(&self, mut document: Document, bar: &Bar, top: f64) -> Document {
        let right = self.left() - PADDING;
        let middle = top + bar.height() / 2.0;
        let mut y = middle - bar.text_height() / 2.0;
        for label in wrapped(&bar.label) {
            y += LABEL + 2.0;
            document = document.add(text(label, right, y - 3.0, LABEL).set("text-anchor", "end"));
        }
        if !bar.detail.is_empty() {
            let detail = text(&bar.detail, right, y + DETAIL, DETAIL);
            document = document.add(detail.set("text-anchor", "end").set("fill", "#555555"));
        }
        let mut value = 0.0;
        let mut end = self.x(self.origin());
        for part in &bar.parts {
            value += part.value;
            let to = self.x(value);
            let (from, length) = (end.min(to), (to - end).abs().max(1.0));
            let part = rectangle(from, middle - BAR / 2.0, length, BAR).set("fill", part.colour);
            document = document.add(part);
            end = to;
        }
        if let Some(target) = bar.mark {
            let reach = BAR / 2.0 + 4.0;
            document = document.add(mark(self.x(target), middle - reach, middle + reach));
        }
        let ends = [end, self.x(self.origin()), bar.mark.map_or(end, |mark| self.x(mark))];
        let behind = ends.into_iter().fold(end, f64::max) + 8.0;
        let figure = text(&bar.text, behind, middle + 5.0, LABEL).set("fill", bar.text_colour);
        document.add(figure.set("font-weight", "bold"))
    }

    fn has_marks(&self) -> bool {
        self.bars.iter().any(|bar| bar.mark.is_some())
    }

    /// Returns where the axis begins: behind the longest line of a label.
    fn left(&self) -> f64 {
        let labels = self.bars.iter().flat_map(|bar| wrapped(&bar.label));
        let labels = labels.map(|line| width_of(line, LABEL));
        let details = self.bars.iter().map(|bar| width_of(&bar.detail, DETAIL));
        (MARGIN + labels.chain(details).fold(0.0, f64::max) + PADDING).round()
    }

    /// Returns the smallest number on the axis.
    fn smallest(&self) -> f64 {
        if !self.is_logarithmic {
            return 0.0;
        }
        let values = self.bars.iter().flat_map(|bar| [bar.value(), bar.mark.unwrap_or(1.0)]);
        let smallest = values.fold(1.0, f64::min);
        let below = LOGARITHMIC_TICKS.iter().rev().find(|tick| **tick <= smallest);
        below.map_or(LOGARITHMIC_TICKS[0], |tick| tick.min(0.5))
    }

    /// Returns the largest number that has to fit.
    fn largest(&self) -> f64 {
        let ends = self.bars.iter().map(|bar| bar.value().max(bar.mark.unwrap_or(0.0)));
        ends.fold(if self.is_logarithmic { 2.0 } else { f64::MIN_POSITIVE }, f64::max)
    }

    /// Where bars begin: at nothing, or where ratios are equal.
    fn origin(&self) -> f64 {
        if self.is_logarithmic { 1.0 } else { 0.0 }
    }

    fn x(&self, value: f64) -> f64 {
        let smallest = self.smallest();
        let part = if self.is_logarithmic {
            (value.max(smallest) / smallest).ln() / (self.largest() / smallest).ln()
        } else {
            value / self.largest()
        };
        // To a tenth of a pixel, so that the file can be read, too.
        ((self.left() + (RIGHT - self.left()) * part) * 10.0).round() / 10.0
    }

    fn ticks(&self) -> Vec<f64> {
        let largest = self.largest();
        if self.is_logarithmic {
            let shown = self.smallest()..=largest;
            return LOGARITHMIC_TICKS.into_iter().filter(|tick| shown.contains(tick)).collect();
        }
        // Some five of them, at round numbers.
        let magnitude = 10_f64.powf((largest / 5.0).log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * magnitude);
        let step = steps.into_iter().find(|step| largest / step <= 6.0).unwrap_or(magnitude);
        let count = (largest / step).floor() as u32;
        // Multiplied and rounded, since 3 × 0.1 isn't 0.3.
        (0..=count).map(|tick| (f64::from(tick) * step * 1e6).round() / 1e6).collect()
    }
}

impl Bar {
    fn value(&self) -> f64 {
        self.parts.iter().map(|part| part.value).sum()
    }

    fn text_height(&self) -> f64 {
        let label = wrapped(&self.label).len() as f64 * (LABEL + 2.0);
        label + if self.detail.is_empty() { 0.0 } else { DETAIL + 2.0 }
    }

    /// Returns the height of its row.
    fn height(&self) -> f64 {
        self.text_height().max(BAR) + GAP
    }
}

/// Breaks a label into lines of up to [`LINE`] characters, between ", " and what follows.
fn wrapped(label: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = label;
    while rest.chars().count() > LINE {
        let commas = rest.match_indices(", ").map(|(comma, _)| comma + 1);
        let fitting = commas.clone().take_while(|end| rest[..*end].chars().count() <= LINE).last();
        let Some(end) = fitting.or_else(|| commas.clone().next()) else { break };
        lines.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    lines.push(rest);
    lines
}

/// Estimates the width of a line of text, rather too wide than too narrow.
fn width_of(line: &str, size: f64) -> f64 {
    line.chars().count() as f64 * size * CHARACTER
}

/// Draws the line of a target.
fn mark(x: f64, from: f64, to: f64) -> Line {
    line(x, from, to).set("stroke", INK).set("stroke-width", 2)
}

fn text(content: &str, x: f64, y: f64, size: f64) -> Text {
    Text::new(content).set("x", x).set("y", y).set("font-size", size).set("fill", INK)
}

fn rectangle(x: f64, y: f64, width: f64, height: f64) -> Rectangle {
    Rectangle::new().set("x", x).set("y", y).set("width", width).set("height", height)
}

fn line(x: f64, from: f64, to: f64) -> Line {
    Line::new().set("x1", x).set("x2", x).set("y1", from).set("y2", to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_labels_are_wrapped_after_commas() {
        let label = "4 KiB at random, from cold, 100,000 reads, cache of 256 MiB, no TLS";
        let lines = ["4 KiB at random, from cold, 100,000 reads,", "cache of 256 MiB, no TLS"];
        assert_eq!(wrapped(label), lines);
        assert_eq!(wrapped("short, with a comma"), ["short, with a comma"]);
        let long = "x".repeat(2 * LINE);
        assert_eq!(wrapped(&long), [long.as_str()]);
    }

    #[test]
    fn every_label_and_every_bar_is_within_the_picture() {
        let bar = |label: &str, value| Bar {
            label: label.to_owned(),
            detail: String::new(),
            parts: vec![Part { value, colour: INK }],
            text: String::new(),
            text_colour: INK,
            mark: None,
        };
        let bars =
            vec![bar("lost, by far", 0.13), bar(&"won, and with a label, ".repeat(6), 700.0)];
        let (title, axis) = (String::new(), String::new());
        let chart = BarChart { title, axis, is_logarithmic: true, legend: Vec::new(), bars };
        let longest = wrapped(&chart.bars[1].label).into_iter().map(|line| width_of(line, LABEL));
        assert!(chart.left() >= MARGIN + longest.fold(0.0, f64::max));
        assert_eq!(chart.ticks()[0], 0.1);
        assert!(chart.left() < chart.x(0.13) && chart.x(0.13) < chart.x(1.0));
        assert_eq!(chart.x(700.0), RIGHT);
    }
}
