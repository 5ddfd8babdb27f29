//! Logs to the systemd journal by its native protocol. Properties of a connection become fields
//! that can be queried, as in `journalctl HEXZ_NBD_EXPORT=snap.hexz`.
//!
//! <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>. The protocol passes long entries as memory files,
//! which the sandbox forbids. Values are cut instead, so that each entry fits into a datagram. The
//! crate `tracing-journald` needs memory files, blocks while the journal is slow, and drops entries
//! without counting them.

use std::fmt::Debug;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};

use nbd_telemetry::escape;
use socket2::SockRef;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::{LookupSpan, Scope};

use super::text::priority;

/// Socket that the journal listens on.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";

/// Length at which values are cut, in bytes. An entry has less than a dozen values, so it fits into
/// a datagram.
const MAX_VALUE: usize = 8 * 1024;

/// Size of the send buffer for entries that the journal hasn't read yet, in bytes. The kernel may
/// grant less.
const SEND_BUFFER: usize = 1024 * 1024;

/// Connection to the journal.
#[derive(Debug)]
pub(super) struct Journal {
    socket: UnixDatagram,
    /// Number of entries that the journal didn't take, and that haven't been reported yet.
    lost: AtomicU64,
}

impl Journal {
    /// Connects to the journal.
    ///
    /// # Errors
    /// There is no journal, or its socket can't be set up.
    pub(super) fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(SOCKET)?;
        // Threads that serve clients must not wait for a slow journal.
        socket.set_nonblocking(true)?;
        SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER)?;
        Ok(Self { socket, lost: AtomicU64::new(0) })
    }

    /// Sends an entry. Lost entries are counted, and reported before the next one.
    fn send(&self, entry: &[u8]) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let words = format!("{lost} log lines were lost: the journal didn't accept them");
            let reason = [("reason", "log_lines_lost".to_owned())];
            if self.socket.send(&encode_entry(Level::WARN, &words, &reason)).is_err() {
                self.lost.fetch_add(lost + 1, Ordering::Relaxed);
                return;
            }
        }
        if self.socket.send(entry).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut words = String::new();
        let mut all: Vec<(&'static str, String)> = Vec::new();
        for span in context.event_scope(event).into_iter().flat_map(Scope::from_root) {
            if let Some(fields) = span.extensions().get::<Fields>() {
                words.push_str(span.name());
                words.push('{');
                words.push_str(&fields.format());
                words.push_str("}: ");
                all.extend(fields.values.iter().cloned());
            }
        }
        words.push_str(&own.message);
        if !own.values.is_empty() {
            words.push(' ');
            words.push_str(&own.format());
        }
        all.extend(own.values);
        self.send(&encode_entry(*event.metadata().level(), &words, &all));
    }
}

/// Fields of a span or an event, by name.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    values: Vec<(&'static str, String)>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: String) {
        let earlier = self.values.iter_mut().find(|(name, _)| *name == field.name());
        match (field.name(), earlier) {
            ("message", _) => self.message = value,
            (_, Some((_, earlier))) => *earlier = value,
            (name, None) => self.values.push((name, value)),
        }
    }

    /// Formats the fields for people.
    fn format(&self) -> String {
        let words = self.values.iter().map(|(name, value)| format!("{name}={value}"));
        words.collect::<Vec<_>>().join(" ")
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.set(field, format!("{value:?}"));
    }
}

/// Encodes an entry. Hidden characters are escaped, because the journal doesn't show a value with
/// control characters.
fn encode_entry(level: Level, words: &str, fields: &[(&str, String)]) -> Vec<u8> {
    let mut entry = Vec::with_capacity(512);
    append_field(&mut entry, "MESSAGE", words);
    append_field(&mut entry, "PRIORITY", &priority(level).to_string());
    append_field(&mut entry, "SYSLOG_IDENTIFIER", env!("CARGO_PKG_NAME"));
    for (name, value) in fields {
        append_field(&mut entry, &format!("HEXZ_NBD_{}", name.to_ascii_uppercase()), value);
    }
    entry
}

/// Adds a field with the length of its value, so that nothing in the value can be taken for another
/// field.
fn append_field(entry: &mut Vec<u8>, name: &str, value: &str) {
    let mut clean = escape::text(value).into_owned();
    if clean.len() > MAX_VALUE {
        clean.truncate(clean.floor_char_boundary(MAX_VALUE));
        clean.push('…');
    }
    entry.extend_from_slice(name.as_bytes());
    entry.push(b'\n');
    entry.extend_from_slice(&(clean.len() as u64).to_le_bytes());
    entry.extend_from_slice(clean.as_bytes());
    entry.push(b'\n');
}
