//! A line of the table.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

/// A number with its unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) value: f64,
    pub(crate) unit: Unit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Unit {
    ReadsPerSecond,
    HandshakesPerSecond,
    MibPerSecond,
    Seconds,
    /// Seconds of processor time for a GiB.
    SecondsPerGib,
    /// Seconds of processor time for a read or a handshake.
    SecondsEach,
    Bytes,
    Blocks,
}

impl Unit {
    pub(crate) fn of(self, value: f64) -> Figure {
        Figure { value, unit: self }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const KIB: f64 = 1024.0;
        const MIB: f64 = 1024.0 * 1024.0;
        let value = self.value;
        match self.unit {
            Unit::ReadsPerSecond => write!(f, "{} reads/s", grouped(value)),
            Unit::HandshakesPerSecond => write!(f, "{} /s", grouped(value)),
            Unit::MibPerSecond => write!(f, "{} MiB/s", grouped(value)),
            Unit::Seconds if value < 1e-3 => write!(f, "{:.0} µs", value * 1e6),
            Unit::Seconds if value < 1.0 => write!(f, "{:.2} ms", value * 1e3),
            Unit::Seconds => write!(f, "{value:.2} s"),
            Unit::SecondsPerGib => write!(f, "{value:.2} s/GiB"),
            Unit::SecondsEach => write!(f, "{:.1} µs each", value * 1e6),
            Unit::Bytes if value.abs() < MIB => write!(f, "{:.1} KiB", value / KIB),
            Unit::Bytes => write!(f, "{:.1} MiB", value / MIB),
            Unit::Blocks => write!(f, "{} blocks", grouped(value)),
        }
    }
}

/// 12,345.
pub(crate) fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What a ratio should be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) enum Aim {
    AtLeast(f64),
    AtMost(f64),
}

impl Aim {
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(aim) => ratio >= aim,
            Self::AtMost(aim) => ratio <= aim,
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(aim) => write!(f, "≥ {aim}"),
            Self::AtMost(aim) => write!(f, "≤ {aim}"),
        }
    }
}

/// The gateway's figure, and what it is compared with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) ours: Option<Figure>,
    /// Whose the other figure is, or what.
    pub(crate) other: String,
    pub(crate) theirs: Option<Figure>,
    pub(crate) aim: Option<Aim>,
    /// Processor time of the two servers.
    pub(crate) our_cpu: Option<Figure>,
    pub(crate) their_cpu: Option<Figure>,
    pub(crate) note: Option<String>,
    /// What the other figure is the sum of.
    pub(crate) parts: Vec<(String, f64)>,
    /// The gateway's figure by that of the other.
    #[serde(serialize_with = "rounded")]
    pub(crate) ratio: Option<f64>,
    pub(crate) is_met: Option<bool>,
}

impl Row {
    /// `theirs` is `None` for a peer that isn't installed.
    pub(crate) fn new(
        what: impl Into<String>,
        ours: Figure,
        other: impl Into<String>,
        theirs: Option<Figure>,
    ) -> Self {
        Self {
            what: what.into(),
            ours: Some(ours),
            other: other.into(),
            theirs,
            aim: None,
            our_cpu: None,
            their_cpu: None,
            note: None,
            parts: Vec::new(),
            ratio: theirs.map(|theirs| ours.value / theirs.value),
            is_met: None,
        }
    }

    /// What stands in the table for a case that could not be measured.
    pub(crate) fn failed(error: &anyhow::Error) -> Self {
        let nothing = Unit::Seconds.of(f64::NAN);
        let note = Some(format!("could not be measured: {error:#}"));
        Self { ours: None, note, ..Self::new("", nothing, "", None) }
    }

    pub(crate) fn aim(mut self, aim: Aim) -> Self {
        self.aim = Some(aim);
        self.is_met = self.ratio.map(|ratio| aim.is_met(ratio));
        self
    }

    pub(crate) fn cpu(mut self, ours: Figure, theirs: Option<Figure>) -> Self {
        self.our_cpu = Some(ours);
        self.their_cpu = theirs;
        self
    }

    pub(crate) fn parts(mut self, parts: Vec<(&'static str, f64)>) -> Self {
        self.parts = parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

fn rounded<S: Serializer>(ratio: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    ratio.map(|ratio| (ratio * 1000.0).round() / 1000.0).serialize(serializer)
}
