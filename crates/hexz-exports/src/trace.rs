//! Traces: which parts of a disk were read, in the order of their first use.
//!
//! A trace refers to the disk and not to the archive, so it stays useful when the disk is packed
//! anew. It is only a hint about what to fetch first, and needs no protection.
//!
//! ```text
//! hexz-trace 1
//! export web main 2147483648
//! 0 65536 0
//! 1048576 131072 12
//! ```
//!
//! After the version, the second line names the export, the stream and the size of the stream in
//! bytes. Each other line is an offset and a length in bytes, and the time of the first use in
//! milliseconds since the first read.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use hexz_reader::StreamKind;

/// Unit in which reads are recorded, in bytes.
pub(super) const TRACE_UNIT: u64 = 64 * 1024;
/// Maximum number of ranges.
pub(super) const MAX_TRACE_RANGES: usize = 128 * 1024;
/// Maximum length of a trace as text, in bytes.
pub const MAX_TRACE_LENGTH: u64 = 6 << 20;

const FIRST_LINE: &str = "hexz-trace 1";

/// The parts of a stream that were read.
///
/// ```
/// use hexz_exports::Trace;
///
/// let text = "hexz-trace 1\nexport web main 1048576\n65536 131072 0\n0 65536 12\n";
/// let trace: Trace = text.parse()?;
/// assert_eq!(trace.ranges.len(), 2);
/// assert_eq!(trace.bytes(), 196_608);
/// assert_eq!(trace.to_string(), text);
/// # Ok::<(), hexz_exports::TraceError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The export and its stream.
    pub source: TraceSource,
    /// Ranges in the order of their first use. They may overlap.
    pub ranges: Vec<TracedRange>,
}

/// What a trace was recorded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceSource {
    /// Name of the export.
    pub export: String,
    /// Stream of the snapshot.
    pub stream: StreamKind,
    /// Size of the stream, in bytes.
    pub size: u64,
}

/// A part of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TracedRange {
    /// Start, in bytes.
    pub offset: u64,
    /// Length in bytes, at least 1.
    pub length: u64,
    /// Time of the first use, from the first read on; in whole milliseconds.
    pub at: Duration,
}

/// Reason for which text isn't a trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// The first line isn't that of a trace.
    #[error("not a trace: the first line isn't {FIRST_LINE:?}")]
    NotATrace,
    /// The second line is missing or invalid.
    #[error("line 2: expected \"export NAME main|aux SIZE\"")]
    Source,
    /// A line isn't a range.
    #[error("line {0}: expected an offset, a length and milliseconds")]
    Range(usize),
    /// A range isn't within the stream.
    #[error("line {0}: the range isn't within the stream")]
    Outside(usize),
    /// There are too many ranges.
    #[error("more than {MAX_TRACE_RANGES} ranges")]
    TooLong,
    /// Traces that are to be merged are of different streams.
    #[error("the traces are of streams that differ in kind or size")]
    Different,
}

impl Trace {
    /// Returns the number of bytes, counting overlapping parts more than once.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.length))
    }

    /// Returns a trace of what at least `least` of the traces contain, in the order of their mean
    /// times. The name of the export is that of the first trace.
    ///
    /// # Errors
    /// The streams differ in kind or size, or the result has too many ranges.
    pub fn merge(traces: &[Self], least: usize) -> Result<Self, TraceError> {
        let [first, others @ ..] = traces else { return Err(TraceError::NotATrace) };
        let kind = |trace: &Self| (trace.source.stream, trace.source.size);
        if others.iter().any(|other| kind(other) != kind(first)) {
            return Err(TraceError::Different);
        }
        let mut units: HashMap<u64, (u64, u64)> = HashMap::new();
        for trace in traces {
            for (unit, at) in trace.first_uses()? {
                let (count, sum) = units.entry(unit).or_default();
                *count += 1;
                *sum += at;
            }
        }
        let mut common: Vec<(u64, u64)> = units
            .into_iter()
            .filter(|(_, (count, _))| *count >= least.max(1) as u64)
            .map(|(unit, (count, sum))| (sum / count, unit))
            .collect();
        common.sort_unstable();
        let uses = common.into_iter().map(|(at, unit)| (unit, at));
        let ranges = ranges_of(uses, first.source.size);
        if ranges.len() > MAX_TRACE_RANGES {
            return Err(TraceError::TooLong);
        }
        Ok(Self { source: first.source.clone(), ranges })
    }

    /// Returns the units of the trace with the milliseconds of their first use.
    fn first_uses(&self) -> Result<HashMap<u64, u64>, TraceError> {
        let mut uses = HashMap::new();
        for range in &self.ranges {
            let at = u64::try_from(range.at.as_millis()).unwrap_or(u64::MAX);
            for unit in units_of(range.offset, range.length) {
                let first = uses.entry(unit).or_insert(at);
                *first = at.min(*first);
                // A range may be as long as the disk.
                if uses.len() > MAX_TRACE_RANGES {
                    return Err(TraceError::TooLong);
                }
            }
        }
        Ok(uses)
    }
}

/// Returns the units that contain a range.
pub(super) fn units_of(offset: u64, length: u64) -> std::ops::Range<u64> {
    offset / TRACE_UNIT..offset.saturating_add(length).div_ceil(TRACE_UNIT)
}

/// Joins units that follow one another, given with milliseconds, to ranges of a stream of `size`
/// bytes.
pub(super) fn ranges_of(uses: impl IntoIterator<Item = (u64, u64)>, size: u64) -> Vec<TracedRange> {
    let mut ranges: Vec<TracedRange> = Vec::new();
    for (unit, at) in uses {
        let offset = unit.saturating_mul(TRACE_UNIT);
        let length = TRACE_UNIT.min(size.saturating_sub(offset));
        match ranges.last_mut() {
            Some(last) if last.offset + last.length == offset => last.length += length,
            _ => ranges.push(TracedRange { offset, length, at: Duration::from_millis(at) }),
        }
    }
    ranges
}

impl FromStr for Trace {
    type Err = TraceError;

    fn from_str(text: &str) -> Result<Self, TraceError> {
        let mut lines = text.lines();
        if lines.next() != Some(FIRST_LINE) {
            return Err(TraceError::NotATrace);
        }
        let source = lines.next().and_then(parse_source).ok_or(TraceError::Source)?;
        let mut ranges = Vec::new();
        for (number, line) in (3..).zip(lines) {
            let range = parse_range(line).ok_or(TraceError::Range(number))?;
            let end = range.offset.checked_add(range.length);
            if range.length == 0 || end.is_none_or(|end| end > source.size) {
                return Err(TraceError::Outside(number));
            }
            if ranges.len() == MAX_TRACE_RANGES {
                return Err(TraceError::TooLong);
            }
            ranges.push(range);
        }
        Ok(Self { source, ranges })
    }
}

fn parse_source(line: &str) -> Option<TraceSource> {
    // The name may contain spaces.
    let mut words = line.strip_prefix("export ")?.rsplitn(3, ' ');
    let size = words.next()?.parse().ok()?;
    let stream = match words.next()? {
        "main" => StreamKind::Main,
        "aux" => StreamKind::Auxiliary,
        _ => return None,
    };
    Some(TraceSource { export: words.next()?.to_owned(), stream, size })
}

fn parse_range(line: &str) -> Option<TracedRange> {
    let mut words = line.split(' ').map(|word| word.parse().ok());
    let (offset, length, at) = (words.next()??, words.next()??, words.next()??);
    let at = Duration::from_millis(at);
    words.next().is_none().then_some(TracedRange { offset, length, at })
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        self.ranges.iter().try_for_each(|range| writeln!(f, "{range}"))
    }
}

/// Shows the first two lines of a trace.
impl fmt::Display for TraceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stream = match self.stream {
            StreamKind::Main => "main",
            StreamKind::Auxiliary => "aux",
        };
        writeln!(f, "{FIRST_LINE}\nexport {} {stream} {}", self.export.escape_debug(), self.size)
    }
}

/// Shows a line of a trace.
impl fmt::Display for TracedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.offset, self.length, self.at.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trace(ranges: &str) -> Result<Trace, TraceError> {
        format!("hexz-trace 1\nexport a disk main 1048576\n{ranges}").parse()
    }

    #[test]
    fn traces_are_read_and_written_alike() {
        let text = "hexz-trace 1\nexport a disk main 1048576\n65536 131072 0\n0 65536 12\n";
        let trace: Trace = text.parse().unwrap();
        assert_eq!(trace.source.export, "a disk");
        assert_eq!(trace.ranges[1].at, Duration::from_millis(12));
        assert_eq!((trace.bytes(), trace.to_string()), (196_608, text.to_owned()));
    }

    #[test]
    fn anything_else_is_refused_with_its_line() {
        for text in ["", "hexz-trace 2\nexport a main 1\n", "<html>"] {
            assert_eq!(text.parse::<Trace>(), Err(TraceError::NotATrace), "{text}");
        }
        for line in ["", "export a 1", "export a other 1", "export a main -1", "a main 1"] {
            let text = format!("hexz-trace 1\n{line}\n");
            assert_eq!(text.parse::<Trace>(), Err(TraceError::Source), "{line}");
        }
        for line in ["0 1", "0 1 2 3", "0  1 2", "x 1 2", "-1 1 2", "18446744073709551616 1 2", ""]
        {
            assert_eq!(trace(&format!("0 1 2\n{line}\n")), Err(TraceError::Range(4)), "{line}");
        }
        for line in ["0 0 0", "1048576 1 0", "1 1048576 0", "1 18446744073709551615 0"] {
            assert_eq!(trace(line), Err(TraceError::Outside(3)), "{line}");
        }
        assert_eq!(trace(&"0 1 0\n".repeat(MAX_TRACE_RANGES + 1)), Err(TraceError::TooLong));
        assert!(trace(&"0 1 0\n".repeat(MAX_TRACE_RANGES)).is_ok());
    }

    #[test]
    fn a_merged_trace_has_what_enough_traces_have_by_mean_time() {
        let traces = [
            trace("0 65536 0\n262144 65536 90\n131072 65536 100\n").unwrap(),
            trace("131072 65536 0\n0 65536 10\n").unwrap(),
            trace("262144 65536 70\n917504 1 1\n").unwrap(),
        ];
        let merged = |least| Trace::merge(&traces, least).unwrap();
        let offsets = |trace: Trace| trace.ranges.iter().map(|it| it.offset).collect::<Vec<_>>();
        assert_eq!(offsets(merged(2)), [0, 131_072, 262_144]);
        assert_eq!(offsets(merged(1)), [917_504, 0, 131_072, 262_144]);
        assert_eq!(offsets(merged(3)), [0; 0]);
        let mut other = traces[0].clone();
        other.source.size += 1;
        assert_eq!(Trace::merge(&[traces[0].clone(), other], 1), Err(TraceError::Different));
        assert_eq!(Trace::merge(&[], 1), Err(TraceError::NotATrace));
    }

    #[test]
    fn merging_joins_neighbors_and_ends_with_the_disk() {
        let source = TraceSource { export: "x".into(), stream: StreamKind::Main, size: 100_000 };
        let range = |offset, length| TracedRange { offset, length, at: Duration::ZERO };
        let trace = Trace { source, ranges: vec![range(5, 10), range(70_000, 30_000)] };
        let merged = Trace::merge(&[trace], 1).unwrap();
        assert_eq!(merged.ranges, [range(0, 100_000)]);
    }

    proptest! {
        /// Whatever is accepted is within its stream, and is written as it was read.
        #[test]
        fn lines_of_any_kind_are_refused_or_kept(
            head in "hexz-trace [12]\n|",
            source in "export [a-z ]{0,3} (main|aux|x) [0-9]{1,8}\n|[ -~]{0,9}\n",
            lines in prop::collection::vec("[0-9]{1,7} [0-9]{1,7} [0-9]{1,20}|[ -~]{0,9}", 0..4),
        ) {
            let text = format!("{head}{source}{}\n", lines.join("\n"));
            if let Ok(trace) = text.parse::<Trace>() {
                let size = trace.source.size;
                prop_assert!(trace.ranges.iter().all(|it| it.offset + it.length <= size));
                prop_assert_eq!(trace.to_string().parse(), Ok(trace.clone()));
                prop_assert!(Trace::merge(&[trace.clone(), trace], 2).is_ok());
            }
        }
    }

    #[test]
    fn a_range_as_long_as_a_huge_disk_takes_no_memory() {
        let size = 1_u64 << 50;
        let text = format!("hexz-trace 1\nexport a main {size}\n0 {size} 0\n");
        let trace: Trace = text.parse().unwrap();
        assert_eq!(Trace::merge(&[trace], 1), Err(TraceError::TooLong));
    }
}
