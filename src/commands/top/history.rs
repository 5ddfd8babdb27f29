//! Keeps the latest answers of a server, and derives rates from them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::format::duration;
use super::view::{Frame, total_increase};
use crate::commands::monitor_client::MonitorError;
use crate::exit_status::ExitStatus;
use crate::monitor::Status;

/// Number of answers that are kept. Rates and latencies in tables span all of them.
const MAX_ANSWERS: usize = 4;

/// Number of rates that are kept, for the sparkline: more than a terminal has columns.
const MAX_RATES: usize = 1000;

/// Minimum time between two answers, whatever clocks say. It keeps rates finite.
const MIN_INTERVAL: Duration = Duration::from_millis(1);

/// The latest answers, oldest first.
#[derive(Debug, Default)]
pub(super) struct History {
    answers: VecDeque<(Instant, Status)>,
    rates: VecDeque<f64>,
    last_error: Option<String>,
}

impl History {
    /// Records the result of a request, and its time.
    pub(super) fn record(&mut self, at: Instant, answer: Result<Status, MonitorError>) {
        let status = match answer {
            Ok(status) => status,
            Err(error) => {
                self.last_error = Some(format!("{error} [{}]", error.label()));
                return;
            }
        };
        self.last_error = None;
        if let Some((then, last)) = self.answers.back() {
            // After a restart all counters start from zero.
            if last.pid == status.pid && last.started.total_cmp(&status.started).is_eq() {
                let risen = total_increase(&status, last, |export| export.bytes);
                self.rates.push_back(per_second(risen, at.duration_since(*then)));
            } else {
                self.answers.clear();
                self.rates.clear();
            }
        }
        self.answers.push_back((at, status));
        while self.answers.len() > MAX_ANSWERS {
            self.answers.pop_front();
        }
        while self.rates.len() > MAX_RATES {
            self.rates.pop_front();
        }
    }

    /// Returns the data to show at time `at`.
    pub(super) fn frame(&mut self, at: Instant) -> Frame<'_> {
        let newest = self.answers.back();
        let before = self.answers.front().zip(newest).and_then(|((then, before), (now, _))| {
            let seconds = now.duration_since(*then);
            (seconds >= MIN_INTERVAL).then_some((before, seconds.as_secs_f64()))
        });
        let age = newest.map(|(then, _)| duration(at.duration_since(*then).as_secs_f64()));
        let error = self.last_error.as_ref().map(|error| match age {
            Some(age) => format!("{error} (the data is {age} old)"),
            None => error.clone(),
        });
        let now = newest.map(|(_, status)| status);
        Frame { latest: now, earlier: before, rates: self.rates.make_contiguous(), error }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn per_second(many: u64, time: Duration) -> f64 {
    many as f64 / time.max(MIN_INTERVAL).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::MonitorEndpoint;
    use nbd_gateway::{ExportReport, GatewayReport};

    fn status(pid: u32, bytes: u64) -> Status {
        let exports = vec![ExportReport { bytes, ..ExportReport::default() }];
        Status {
            pid,
            gateway: GatewayReport { exports, ..Default::default() },
            ..Default::default()
        }
    }

    #[test]
    fn a_new_export_has_no_rate_yet() {
        let start = Instant::now();
        let mut history = History::default();
        history.record(start, Ok(status(1, 1000)));
        let mut two = status(1, 1010);
        let new = ExportReport { name: "new".into(), bytes: 5000, ..ExportReport::default() };
        two.gateway.exports.push(new);
        history.record(start + Duration::from_secs(1), Ok(two.clone()));
        two.gateway.exports[1].bytes = 5007;
        history.record(start + Duration::from_secs(2), Ok(two));
        assert_eq!(history.frame(start + Duration::from_secs(2)).rates, [10.0, 7.0]);
    }

    #[test]
    fn rates_do_not_span_a_restart() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut history = History::default();
        history.record(at(0), Ok(status(1, 1000)));
        assert!(history.frame(at(0)).earlier.is_none());
        for second in 1..=5 {
            history.record(at(second), Ok(status(1, 1000 + 10 * second * second)));
        }
        let frame = history.frame(at(5));
        assert_eq!(frame.rates, [10.0, 30.0, 50.0, 70.0, 90.0]);
        let (before, seconds) = frame.earlier.unwrap();
        assert_eq!((before.gateway.exports[0].bytes, seconds), (1040, 3.0));

        let endpoint = MonitorEndpoint::default();
        let error = MonitorError { endpoint, reason: "timeout", problem: String::new() };
        history.record(at(7), Err(error));
        let frame = history.frame(at(7));
        assert!(frame.error.unwrap().contains("2 s old"));
        assert!(frame.latest.is_some());

        history.record(at(8), Ok(status(2, 5)));
        let frame = history.frame(at(8));
        assert!(frame.error.is_none() && frame.earlier.is_none() && frame.rates.is_empty());
    }
}
