//! Formats numbers for people: short, with units.

use std::time::Duration;

use nbd_gateway::DurationHistogram;
use nbd_telemetry::escape;

/// Formats a number of bytes, in units of powers of 1024.
#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
pub(super) fn bytes(value: u64) -> String {
    scaled(value as f64)
}

/// Formats a rate in bytes per second.
pub(super) fn rate(value: f64) -> String {
    format!("{}/s", scaled(value))
}

fn scaled(mut value: f64) -> String {
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        // Not 1024, so that nothing is rounded up to "1024" of a unit.
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    // 99.95 would be rounded to 100.0.
    let digits = usize::from(unit != "B" && value < 99.95);
    format!("{value:.digits$} {unit}")
}

/// Formats an integer, with commas between thousands.
pub(super) fn format_count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a rate in events per second.
pub(super) fn per_second(value: f64) -> String {
    let whole = format!("{value:.0}").parse().unwrap_or(u64::MAX);
    format!("{}/s", format_count(whole))
}

pub(super) fn percent(part: f64) -> String {
    let digits = usize::from((0.0005..0.9995).contains(&part));
    format!("{:.digits$} %", 100.0 * part)
}

/// Formats a duration, given in seconds, in its two largest units.
pub(super) fn duration(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX).as_secs();
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (10.., _, _) => format!("{days} days"),
        (1.., _, _) => format!("{days} d {hours} h"),
        (0, 1.., _) => format!("{hours} h {minutes} min"),
        (0, 0, 1..) => format!("{minutes} min {} s", whole % 60),
        (0, 0, 0) => format!("{whole} s"),
    }
}

/// Returns the increase of a counter. A counter that fell has been reset, and counts from zero.
pub(super) fn increase(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

/// Returns the `part` quantile of the reads since `before`, in seconds; `None` if there were none.
///
/// The estimate is that of Prometheus: reads count as evenly spread within a bucket, and a quantile
/// beyond the last finite limit is that limit.
#[expect(clippy::cast_precision_loss, reason = "counts of some seconds")]
pub(super) fn quantile(
    now: &DurationHistogram,
    before: Option<&DurationHistogram>,
    part: f64,
) -> Option<f64> {
    let earlier = |position: usize| {
        before.and_then(|histogram| histogram.buckets.get(position)).map_or(0, |bucket| bucket.1)
    };
    let buckets: Vec<(f64, f64)> = now
        .buckets
        .iter()
        .enumerate()
        .map(|(position, (limit, many))| (*limit, increase(*many, earlier(position)) as f64))
        .collect();
    let all = increase(now.count, before.map_or(0, |histogram| histogram.count));
    if all == 0 {
        return None;
    }
    let wanted = part * all as f64;
    let (mut from, mut below) = (0.0, 0.0);
    for (limit, many) in buckets {
        if many >= wanted {
            let share = if many > below { (wanted - below) / (many - below) } else { 1.0 };
            return Some(from + (limit - from) * share);
        }
        (from, below) = (limit, many);
    }
    Some(from)
}

/// Escapes untrusted text, so that it can't disturb the terminal. Characters that are invisible, or
/// whose width isn't certain, are written as `\u{…}`.
pub(super) fn escape_untrusted(text: &str) -> String {
    let mut cleaned = String::new();
    for character in text.chars() {
        match character {
            ' '..='~' | '¡'..='\u{ac}' | '®'..='\u{24f}' | 'Ѐ'..='\u{482}' | 'Ҋ'..='ԯ' => {
                cleaned.push(character);
            }
            // Greek, without the unassigned code points.
            'Α'..='Ρ' | 'Σ'..='Ϋ' | 'ά'..='ώ' => cleaned.push(character),
            '…' | '–' | '—' | '‘'..='”' | '€' => cleaned.push(character),
            other => escape::push_escape(&mut cleaned, other),
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formatted_numbers_are_short() {
        let sizes = [0, 1023, 1024, 102_300, 102_400, 1 << 20, (1 << 30) - 1, u64::MAX];
        assert_eq!(
            sizes.map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "99.9 KiB", "100 KiB", "1.0 MiB", "1.0 GiB", "16.0 EiB"]
        );
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(format_count),
            ["0", "999", "1,000", "1,234,567"].map(String::from)
        );
        assert_eq!([0.0, 0.5, 1.0].map(percent), ["0 %", "50.0 %", "100 %"].map(String::from));
        assert_eq!(
            [-1.0, 59.9, 61.0, 3600.0, 90_000.0, 1e9, f64::INFINITY].map(duration),
            [
                "0 s",
                "59 s",
                "1 min 1 s",
                "1 h 0 min",
                "1 d 1 h",
                "11574 days",
                "213503982334601 days"
            ]
            .map(String::from)
        );
        assert_eq!([1.4, 1e30].map(per_second), ["1/s", "18,446,744,073,709,551,615/s"]);
    }

    #[test]
    fn quantiles_cover_only_reads_since_the_earlier_answer() {
        let histogram = |counts: [u64; 2], count| DurationHistogram {
            count,
            buckets: [0.001, 0.01].into_iter().zip(counts).collect(),
            sum: 0.0,
        };
        let (before, now) = (histogram([100, 100], 100), histogram([150, 200], 200));
        assert_eq!(quantile(&now, Some(&before), 0.25), Some(0.0005));
        let upper = quantile(&now, Some(&before), 0.75).unwrap();
        assert!((0.005_499..0.005_501).contains(&upper), "{upper}");
        assert_eq!(quantile(&histogram([0, 0], 9), None, 0.5), Some(0.01));
        assert_eq!(quantile(&now, Some(&now), 0.5), None);
        assert_eq!(quantile(&DurationHistogram::default(), None, 0.5), None);
    }

    #[test]
    fn untrusted_text_is_escaped() {
        assert_eq!(escape_untrusted("dns:büro.example.org"), "dns:büro.example.org");
        assert_eq!(escape_untrusted("a\u{1b}[31m\r\n\u{9b}b"), r"a\u{1b}[31m\r\n\u{9b}b");
        assert_eq!(
            escape_untrusted("\u{202e}x\u{200d}\u{ad}\u{301}北"),
            r"\u{202e}x\u{200d}\u{ad}\u{301}\u{5317}"
        );
    }
}
