//! Keeps the latest answers of a server, and derives rates from them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::fetch::AskError;
use super::figures::duration;
use super::status::Status;
use super::view::{Picture, rise_of_exports};

/// Number of answers that are kept. Rates and latencies in tables span all of them.
const ANSWERS: usize = 4;

/// Number of rates that are kept, for the sparkline: more than a terminal has columns.
const RATES: usize = 1000;

/// Minimum time between two answers, whatever clocks say. It keeps rates finite.
const LEAST_STEP: Duration = Duration::from_millis(1);

/// The latest answers, oldest first.
#[derive(Debug, Default)]
pub(super) struct History {
    answers: VecDeque<(Instant, Status)>,
    rates: VecDeque<f64>,
    trouble: Option<String>,
}

impl History {
    /// Records the result of a request, and its time.
    pub(super) fn note(&mut self, at: Instant, answer: Result<Status, AskError>) {
        let status = match answer {
            Ok(status) => status,
            Err(error) => {
                self.trouble = Some(error.to_string());
                return;
            }
        };
        self.trouble = None;
        if let Some((then, last)) = self.answers.back() {
            // After a restart all counters start from zero.
            if last.pid == status.pid && last.started.total_cmp(&status.started).is_eq() {
                let risen = rise_of_exports(&status, last, |export| export.bytes);
                self.rates.push_back(per_second(risen, at.duration_since(*then)));
            } else {
                self.answers.clear();
                self.rates.clear();
            }
        }
        self.answers.push_back((at, status));
        while self.answers.len() > ANSWERS {
            self.answers.pop_front();
        }
        while self.rates.len() > RATES {
            self.rates.pop_front();
        }
    }

    /// Returns the data to show at time `at`.
    pub(super) fn picture(&mut self, at: Instant) -> Picture<'_> {
        let newest = self.answers.back();
        let before = self.answers.front().zip(newest).and_then(|((then, before), (now, _))| {
            let seconds = now.duration_since(*then);
            (seconds >= LEAST_STEP).then_some((before, seconds.as_secs_f64()))
        });
        let age = newest.map(|(then, _)| duration(at.duration_since(*then).as_secs_f64()));
        let trouble = self.trouble.as_ref().map(|trouble| match age {
            Some(age) => format!("{trouble} (what is shown is {age} old)"),
            None => trouble.clone(),
        });
        let now = newest.map(|(_, status)| status);
        Picture { now, before, rates: self.rates.make_contiguous(), trouble }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn per_second(many: u64, time: Duration) -> f64 {
    many as f64 / time.max(LEAST_STEP).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::super::status::Export;
    use super::*;
    use crate::cli::Place;

    fn status(pid: u64, bytes: u64) -> Status {
        Status { pid, exports: vec![Export { bytes, ..Export::default() }], ..Status::default() }
    }

    #[test]
    fn rates_are_between_answers_of_one_process() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut history = History::default();
        history.note(at(0), Ok(status(1, 1000)));
        assert!(history.picture(at(0)).before.is_none());
        for second in 1..=5 {
            history.note(at(second), Ok(status(1, 1000 + 10 * second * second)));
        }
        let picture = history.picture(at(5));
        assert_eq!(picture.rates, [10.0, 30.0, 50.0, 70.0, 90.0]);
        let (before, seconds) = picture.before.unwrap();
        assert_eq!((before.exports[0].bytes, seconds), (1040, 3.0));

        history.note(at(7), Err(AskError::Silent(Place::default())));
        let picture = history.picture(at(7));
        assert!(picture.trouble.unwrap().ends_with("(what is shown is 2 s old)"));
        assert!(picture.now.is_some());

        history.note(at(8), Ok(status(2, 5)));
        let picture = history.picture(at(8));
        assert!(picture.trouble.is_none() && picture.before.is_none() && picture.rates.is_empty());
    }
}
