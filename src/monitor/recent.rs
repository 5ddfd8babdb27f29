//! Remembers the latest errors in the log.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::status::RecentError;
use nbd_gateway::unix_seconds;
use nbd_telemetry::escape;

/// Maximum number of errors that are remembered.
const MAX_ERRORS: usize = 50;

/// Maximum length of a remembered error, in bytes. The log has it in full.
const MAX_MESSAGE_BYTES: usize = 1000;

/// The latest errors, newest first. Clones share the same errors.
#[derive(Debug, Clone, Default)]
pub(crate) struct RecentErrors(Arc<Mutex<VecDeque<RecentError>>>);

impl RecentErrors {
    /// Returns a `tracing` layer that remembers logged errors here.
    pub(crate) fn layer(&self) -> RecentErrorsLayer {
        RecentErrorsLayer(self.clone())
    }

    /// Returns the remembered errors, newest first.
    pub(super) fn to_vec(&self) -> Vec<RecentError> {
        self.0.lock().iter().cloned().collect()
    }

    /// Adds an error. Errors that differ in numbers only, such as offsets, are counted as one.
    fn push(&self, error: RecentError) {
        let mut all = self.0.lock();
        let is_same = |other: &RecentError| words(&other.message).eq(words(&error.message));
        let earlier = all.iter().position(is_same).and_then(|position| all.remove(position));
        let error = match earlier {
            Some(earlier) => {
                RecentError { count: earlier.count + 1, first: earlier.first, ..error }
            }
            None => error,
        };
        all.truncate(MAX_ERRORS - 1);
        all.push_front(error);
    }
}

/// Returns the words of a message, with an empty one for each number.
fn words(message: &str) -> impl Iterator<Item = &str> {
    message.split(' ').map(|word| {
        let digits = word.trim_matches(['(', ')', ',', ':', ';', '.']);
        let digits = digits.strip_prefix("0x").unwrap_or(digits);
        let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_number && digits.bytes().any(|byte| byte.is_ascii_digit()) { "" } else { word }
    })
}

/// A `tracing` layer that remembers errors, created by [`RecentErrors::layer`]. It doesn't limit
/// the rate of errors; the code that logs them has to.
#[derive(Debug)]
pub(crate) struct RecentErrorsLayer(RecentErrors);

impl<S: Subscriber> Layer<S> for RecentErrorsLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() != Level::ERROR {
            return;
        }
        let mut words = MessageVisitor::default();
        event.record(&mut words);
        let MessageVisitor { mut message, fields } = words;
        message.push_str(&fields);
        let mut message = escape::text(&message).into_owned();
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        let at = unix_seconds(SystemTime::now());
        self.0.push(RecentError { at, message, count: 1, first: at });
    }
}

/// A log line: the message, and the fields in parentheses.
#[derive(Default)]
struct MessageVisitor {
    message: String,
    fields: String,
}

impl Visit for MessageVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let (name, Self { message, fields }) = (field.name(), self);
        let written = match name {
            "message" => write!(message, "{value:?}"),
            name => write!(fields, " ({name} {value:?})"),
        };
        // Writing to a string can't fail.
        written.unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn only_errors_are_remembered() {
        let recent = RecentErrors::default();
        let subscriber = tracing_subscriber::registry().with(recent.layer());
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!("no error");
            for number in 0..2 * MAX_ERRORS {
                tracing::error!(offset = 7, export = %format!("x{number}.hxz"), "a read failed");
            }
            tracing::error!("{}", "ü".repeat(MAX_MESSAGE_BYTES));
        });
        let all = recent.to_vec();
        assert_eq!(all.len(), MAX_ERRORS);
        assert_eq!(all[0].message.chars().count(), MAX_MESSAGE_BYTES / 2);
        assert_eq!(all[1].message, "a read failed (offset 7) (export x99.hxz)");
    }

    #[test]
    fn repeated_errors_are_counted() {
        let recent = RecentErrors::default();
        let push = |at, message: &str| {
            recent.push(RecentError { at, message: message.to_owned(), count: 1, first: at });
        };
        push(1.0, "x1.hxz, byte 512: CRC-32 is 0xabc1, expected 0x12 (offset 512)");
        push(2.0, "x2.hxz, byte 512: CRC-32 is 0xabc1, expected 0x12 (offset 512)");
        push(3.0, "x1.hxz, byte 9: CRC-32 is 0x77, expected 0x1 (offset 0)");
        let all = recent.to_vec();
        assert_eq!(all.iter().map(|error| error.count).collect::<Vec<_>>(), [2, 1]);
        assert_eq!((all[0].first, all[0].at), (1.0, 3.0));
        assert!(all[0].message.starts_with("x1.hxz, byte 9:"), "{all:?}");
    }
}
