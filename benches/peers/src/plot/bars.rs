//! Bars from left to right, one below the other.

use svg::Document;
use svg::node::element::{Line, Rectangle, Text};

pub(super) struct BarChart {
    pub(super) title: String,
    /// What the numbers are, with their unit.
    pub(super) axis: String,
    /// Then bars begin at [`SMALLEST`].
    pub(super) is_logarithmic: bool,
    /// What the colours mean, if they aren't said otherwise.
    pub(super) legend: Vec<(String, &'static str)>,
    pub(super) bars: Vec<Bar>,
}

pub(super) struct Bar {
    pub(super) label: String,
    /// Stands below the label, smaller; may be empty.
    pub(super) detail: String,
    pub(super) parts: Vec<Part>,
    /// Stands at the bar's end.
    pub(super) text: String,
    /// Where a thin line shall be.
    pub(super) mark: Option<f64>,
}

pub(super) struct Part {
    pub(super) value: f64,
    pub(super) colour: &'static str,
}

/// Lengths are in pixels.
const WIDTH: f64 = 940.0;
const MARGIN: f64 = 20.0;
/// Where bars begin, and where the longest one ends: its figure stands behind it.
const LEFT: f64 = 440.0;
const RIGHT: f64 = 840.0;
const TOP: f64 = 50.0;
const ROW: f64 = 38.0;
const BAR: f64 = 20.0;
const LEGEND: f64 = 26.0;
const BOTTOM: f64 = 50.0;

/// Where a logarithmic axis begins.
const SMALLEST: f64 = 0.5;

const INK: &str = "#222222";
const FAINT: &str = "#d5d8dc";

impl BarChart {
    pub(super) fn is_empty(&self) -> bool {
        self.bars.is_empty()
    }

    pub(super) fn draw(&self) -> Document {
        let top = TOP + if self.legend.is_empty() { 0.0 } else { LEGEND };
        let bottom = top + ROW * self.bars.len() as f64;
        let height = bottom + BOTTOM;
        let background = Rectangle::new().set("width", WIDTH).set("height", height);
        let mut document = Document::new()
            .set("viewBox", (0.0, 0.0, WIDTH, height))
            .set("width", WIDTH)
            .set("height", height)
            .set("font-family", "sans-serif")
            .set("role", "img")
            .add(svg::node::element::Title::new(self.title.as_str()))
            .add(background.set("fill", "white"))
            .add(text(&self.title, MARGIN, 30.0, 18.0).set("font-weight", "bold"))
            .add(text(&self.axis, LEFT, height - MARGIN + 6.0, 12.0));
        document = self.draw_legend(document);
        for tick in self.ticks() {
            let x = self.x(tick);
            let label = text(&format!("{tick}"), x, bottom + 14.0, 11.0);
            document = document
                .add(line(x, top, bottom).set("stroke", FAINT))
                .add(label.set("text-anchor", "middle"));
        }
        for (number, bar) in self.bars.iter().enumerate() {
            document = self.draw_bar(document, bar, top + ROW * number as f64);
        }
        document.add(line(self.x(self.origin()), top, bottom).set("stroke", INK))
    }

    fn draw_legend(&self, mut document: Document) -> Document {
        let mut x = MARGIN;
        for (name, colour) in &self.legend {
            document = document
                .add(rectangle(x, TOP - 2.0, 12.0, 12.0).set("fill", *colour))
                .add(text(name, x + 18.0, TOP + 9.0, 13.0));
            x += 40.0 + 8.0 * name.len() as f64;
        }
        document
    }

    fn draw_bar(&self, mut document: Document, bar: &Bar, top: f64) -> Document {
        let middle = top + BAR / 2.0 + 4.0;
        let has_detail = !bar.detail.is_empty();
        let label =
            text(&bar.label, LEFT - 10.0, middle + if has_detail { -3.0 } else { 4.0 }, 13.0);
        document = document.add(label.set("text-anchor", "end"));
        if has_detail {
            let detail = text(&bar.detail, LEFT - 10.0, middle + 11.0, 10.5);
            document = document.add(detail.set("text-anchor", "end").set("fill", "#555555"));
        }
        let mut value = 0.0;
        let mut end = self.x(self.origin());
        for part in &bar.parts {
            value += part.value;
            let to = self.x(value);
            let (from, length) = (end.min(to), (to - end).abs().max(1.0));
            let part = rectangle(from, top + 4.0, length, BAR).set("fill", part.colour);
            document = document.add(part);
            end = to;
        }
        if let Some(mark) = bar.mark {
            let x = self.x(mark);
            let mark = line(x, top, top + BAR + 8.0).set("stroke", "#c0392b");
            document = document.add(mark.set("stroke-width", 2));
        }
        let ends = [end, self.x(self.origin()), bar.mark.map_or(end, |mark| self.x(mark))];
        let behind = ends.into_iter().fold(end, f64::max) + 8.0;
        document.add(text(&bar.text, behind, middle + 4.0, 13.0).set("font-weight", "bold"))
    }

    /// The largest number that has to fit.
    fn largest(&self) -> f64 {
        let ends = self.bars.iter().map(|bar| {
            let length: f64 = bar.parts.iter().map(|part| part.value).sum();
            length.max(bar.mark.unwrap_or(0.0))
        });
        ends.fold(if self.is_logarithmic { 2.0 } else { f64::MIN_POSITIVE }, f64::max)
    }

    /// Where bars begin: at nothing, or where ratios are equal.
    fn origin(&self) -> f64 {
        if self.is_logarithmic { 1.0 } else { 0.0 }
    }

    fn x(&self, value: f64) -> f64 {
        let part = if self.is_logarithmic {
            (value.max(SMALLEST) / SMALLEST).ln() / (self.largest() / SMALLEST).ln()
        } else {
            value / self.largest()
        };
        // To a tenth of a pixel, so that the file can be read, too.
        ((LEFT + (RIGHT - LEFT) * part) * 10.0).round() / 10.0
    }

    fn ticks(&self) -> Vec<f64> {
        let largest = self.largest();
        if self.is_logarithmic {
            let ticks = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];
            return ticks.into_iter().filter(|tick| *tick <= largest).collect();
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

fn text(content: &str, x: f64, y: f64, size: f64) -> Text {
    Text::new(content).set("x", x).set("y", y).set("font-size", size).set("fill", INK)
}

fn rectangle(x: f64, y: f64, width: f64, height: f64) -> Rectangle {
    Rectangle::new().set("x", x).set("y", y).set("width", width).set("height", height)
}

fn line(x: f64, from: f64, to: f64) -> Line {
    Line::new().set("x1", x).set("x2", x).set("y1", from).set("y2", to)
}
