//! Summarizes the stores of remote archives, one line for each.

use super::format::{
    bytes, duration, escape_untrusted, format_count, increase, per_second, quantile, rate,
};
use super::lines::Style;
use super::view::Frame;
use crate::commands::output::format_seconds;
use crate::monitor::{Status, StoreStatus};

/// Maximum number of stores that have a line of their own.
const MAX_LINES: usize = 3;

/// Time before the expiry of credentials from which it is highlighted. Healthy ones are renewed
/// earlier.
const EXPIRES_SOON: f64 = 180.0;

/// Returns the facts for each line: those of each store, or, of many stores, the number of them and
/// those that don't work.
pub(super) fn stores(frame: &Frame<'_>, now: &Status) -> Vec<Vec<(Style, String)>> {
    let all: Vec<Store<'_>> = now.remote.stores.iter().map(|it| Store::new(frame, it)).collect();
    if all.len() <= MAX_LINES {
        return all.iter().map(|store| store.facts(frame, now)).collect();
    }
    let with = |state: State| all.iter().filter(|store| store.state == state).count();
    let mut summary = vec![(Style::Plain, format!("stores {}", all.len()))];
    for state in [State::Working, State::Throttled, State::Down] {
        if with(state) > 0 {
            summary.push((state.style(), format!("{} {}", with(state), state.name())));
        }
    }
    let mut lines = vec![summary];
    let mut affected: Vec<_> = all.iter().filter(|it| it.state != State::Working).collect();
    affected.sort_by_key(|store| store.state != State::Down);
    lines.extend(affected.iter().take(MAX_LINES).map(|store| store.facts(frame, now)));
    lines
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Working,
    Throttled,
    Down,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Working => "working",
            Self::Throttled => "throttled",
            Self::Down => "down",
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Working => Style::Plain,
            Self::Throttled => Style::Warn,
            Self::Down => Style::Bad,
        }
    }
}

/// A store, and its status in the earlier answer.
struct Store<'a> {
    now: &'a StoreStatus,
    before: Option<&'a StoreStatus>,
    state: State,
}

impl<'a> Store<'a> {
    fn new(frame: &Frame<'a>, now: &'a StoreStatus) -> Self {
        let earlier = frame.earlier.iter().flat_map(|(before, _)| &before.remote.stores);
        let before = earlier.into_iter().find(|store| store.name == now.name);
        let state = if now.is_down() {
            State::Down
        } else if before.is_some_and(|before| increase(now.throttled, before.throttled) > 0) {
            State::Throttled
        } else {
            State::Working
        };
        Self { now, before, state }
    }

    #[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
    fn facts(&self, frame: &Frame<'_>, status: &Status) -> Vec<(Style, String)> {
        let Self { now, before, state } = self;
        let name = escape_untrusted(&now.name);
        let mut facts = vec![(state.style(), format!("store {name} {}", state.name()))];
        if let (Some(before), Some((_, seconds))) = (before, frame.earlier) {
            let received = increase(now.total_bytes(), before.total_bytes());
            let requests = increase(now.total_requests(), before.total_requests());
            facts.push((Style::Plain, rate(received as f64 / seconds)));
            facts.push((Style::Plain, per_second(requests as f64 / seconds)));
            let then = Some(&before.request_seconds);
            if let Some(p95) = quantile(&now.request_seconds, then, 0.95) {
                facts.push((Style::Plain, format!("p95 {}", format_seconds(p95))));
            }
        }
        facts.push((Style::Soft, format!("received {}", bytes(now.total_bytes()))));
        for (what, number) in
            [("queued", now.queued), ("retries", now.retries), ("throttled", now.throttled)]
        {
            if number > 0 {
                facts.push((Style::Soft, format!("{what} {}", format_count(number))));
            }
        }
        if let Some(expiry) = now.credentials_expire {
            let left = expiry - status.now;
            let style = if left < EXPIRES_SOON { Style::Bad } else { Style::Soft };
            facts.push((
                style,
                match left <= 0.0 {
                    true => "credentials expired".to_owned(),
                    false => format!("credentials expire in {}", duration(left)),
                },
            ));
        }
        facts
    }
}
