//! Points in time and weekly time windows for rules. All times are in UTC, so there is no daylight
//! saving time.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS_PER_MINUTE: u64 = 60;
const MINUTES_PER_HOUR: u32 = 60;
const MINUTES_PER_DAY: u32 = 24 * MINUTES_PER_HOUR;
const DAY_NAMES: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

/// A point in time, in whole seconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Returns the current time.
    pub fn now() -> Self {
        SystemTime::now().into()
    }

    /// Returns the day of the week, where Monday is 0, and the minute of the day.
    fn weekday_and_minute(self) -> (usize, u32) {
        /// 1970-01-01 was a Thursday.
        const FIRST_WEEKDAY: u64 = 3;
        let minutes = self.0 / SECONDS_PER_MINUTE;
        let day = (minutes / u64::from(MINUTES_PER_DAY) + FIRST_WEEKDAY) % 7;
        let minute = minutes % u64::from(MINUTES_PER_DAY);
        (usize::try_from(day).unwrap_or(0), u32::try_from(minute).unwrap_or(0))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        // A clock set before 1970 is wrong in any case.
        Self(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }
}

/// Weekly time window: `22:00-06:00`, `Sat,Sun`, `Mon-Fri 08:00-18:00`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeWindow {
    /// Days on which the window begins; Monday is the first.
    days: [bool; 7],
    /// Beginning of the window, in minutes of the day.
    from: u32,
    /// End of the window, in minutes of the day, exclusive. If it isn't later than `from`, the
    /// window ends on the next day.
    until: u32,
}

/// Error for a text that isn't a time window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid time window {:?}: expected for example \"22:00-06:00\", \"Sat,Sun\" or \
     \"Mon-Fri 08:00-18:00\" (in UTC)",
    nbd_telemetry::escape::name(.0)
)]
pub struct TimeWindowError(String);

impl TimeWindow {
    /// Returns true if the time is within the window. Times after midnight belong to the day on
    /// which the window began.
    pub fn contains(&self, moment: Timestamp) -> bool {
        let (day, minute) = moment.weekday_and_minute();
        let begins_on = |day: usize| self.days.get(day % 7).copied().unwrap_or(false);
        if self.from < self.until {
            begins_on(day) && (self.from..self.until).contains(&minute)
        } else {
            let yesterday = day + 6;
            (begins_on(day) && minute >= self.from) || (begins_on(yesterday) && minute < self.until)
        }
    }
}

impl FromStr for TimeWindow {
    type Err = TimeWindowError;

    fn from_str(text: &str) -> Result<Self, TimeWindowError> {
        let parse = || {
            let (days, hours) = match text.split_once(' ') {
                Some((days, hours)) => (parse_days(days)?, parse_hours(hours)?),
                None if text.contains(':') => ([true; 7], parse_hours(text)?),
                None => (parse_days(text)?, (0, MINUTES_PER_DAY)),
            };
            Some(Self { days, from: hours.0, until: hours.1 })
        };
        parse().ok_or_else(|| TimeWindowError(text.to_owned()))
    }
}

/// Parses days, such as `Mon-Fri`, `Sat,Sun` or `Fri-Mon`.
fn parse_days(text: &str) -> Option<[bool; 7]> {
    let number = |name: &str| DAY_NAMES.iter().position(|day| day.eq_ignore_ascii_case(name));
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (mut day, last) = (number(first)?, number(last)?);
        *days.get_mut(day)? = true;
        while day != last {
            day = (day + 1) % 7;
            *days.get_mut(day)? = true;
        }
    }
    Some(days)
}

/// Parses hours, such as `08:00-18:00`; `24:00` is the end of the day. An empty range, such as
/// `08:00-08:00`, is rejected.
fn parse_hours(text: &str) -> Option<(u32, u32)> {
    let minutes = |text: &str| {
        let (hours, minutes) = text.split_once(':')?;
        let number = |text: &str| {
            let is_plain = text.len() == 2 && text.bytes().all(|digit| digit.is_ascii_digit());
            is_plain.then(|| text.parse::<u32>().ok()).flatten()
        };
        let (hours, minutes) = (number(hours)?, number(minutes)?);
        let all = hours * MINUTES_PER_HOUR + minutes;
        (minutes < MINUTES_PER_HOUR && all <= MINUTES_PER_DAY).then_some(all)
    };
    let (from, until) = text.split_once('-')?;
    let (from, until) = (minutes(from)?, minutes(until)?);
    (from < MINUTES_PER_DAY && from != until).then_some((from, until))
}

impl fmt::Display for TimeWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days: Vec<&str> = DAY_NAMES
            .iter()
            .zip(self.days)
            .filter_map(|(name, is_meant)| is_meant.then_some(*name))
            .collect();
        if days.len() < DAY_NAMES.len() {
            write!(f, "{} ", days.join(","))?;
        }
        let clock = |minutes: u32| (minutes / MINUTES_PER_HOUR, minutes % MINUTES_PER_HOUR);
        let ((from_hour, from), (until_hour, until)) = (clock(self.from), clock(self.until));
        write!(f, "{from_hour:02}:{from:02}-{until_hour:02}:{until:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a time in minutes since Monday, 5 January 1970, 00:00.
    fn at(minutes: u64) -> Timestamp {
        Timestamp(4 * 86_400 + minutes * SECONDS_PER_MINUTE)
    }

    fn holds(window: &str, minutes: u64) -> bool {
        window.parse::<TimeWindow>().unwrap().contains(at(minutes))
    }

    const DAY: u64 = 24 * 60;

    #[test]
    fn windows_match_hours_of_their_days() {
        assert!(holds("08:00-18:00", 8 * 60) && !holds("08:00-18:00", 18 * 60));
        assert!(holds("Mon-Fri 08:00-18:00", 17 * 60 + 59));
        assert!(!holds("Mon-Fri 08:00-18:00", 5 * DAY + 9 * 60));
        assert!(holds("Sat,Sun", 5 * DAY) && holds("sat,sun", 7 * DAY - 1));
        assert!(!holds("Sat,Sun", 7 * DAY));
        assert!(holds("Fri-Mon", 0) && !holds("Fri-Mon", DAY));
        assert!(holds("08:30-09:15", 8 * 60 + 30) && !holds("08:30-09:15", 8 * 60 + 29));
        assert!(holds("08:30-09:15", 9 * 60 + 14) && !holds("08:30-09:15", 9 * 60 + 15));
        assert!(holds("00:00-24:00", 0) && holds("00:00-24:00", DAY - 1));
    }

    #[test]
    fn hours_after_midnight_belong_to_the_previous_day() {
        let window = "Fri 22:00-06:00";
        assert!(holds(window, 4 * DAY + 22 * 60) && holds(window, 5 * DAY + 5 * 60 + 59));
        assert!(!holds(window, 4 * DAY + 5 * 60) && !holds(window, 5 * DAY + 6 * 60));
        let window = "Sun 23:00-01:00";
        assert!(holds(window, 6 * DAY + 23 * 60) && holds(window, 7 * DAY) && holds(window, 0));
    }

    #[test]
    fn invalid_windows_are_rejected() {
        for junk in [
            "",
            "always",
            "8:00-9:00",
            "08:00",
            "08:00-08:00",
            "24:00-25:00",
            "08:60-09:00",
            "08:60-10:00",
            "07:00-08:60",
            "24:00-06:00",
            "Mon-",
            "Mon 08:00",
            "Mon-Fri  08:00-09:00",
            "-",
            "08:00-18:00 Mon",
            "+8:00-09:00",
        ] {
            assert!(junk.parse::<TimeWindow>().is_err(), "{junk}");
        }
        for window in ["Mon,Tue 08:00-18:00", "22:00-06:00", "Sat 00:00-24:00"] {
            assert_eq!(window.parse::<TimeWindow>().unwrap().to_string(), window);
        }
    }
}
