//! Formats log lines for people. Each entry is one line, whatever its fields contain.

use std::fmt;
use std::os::unix::fs::MetadataExt;

use nbd_telemetry::escape;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{DefaultFields, Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, format};
use tracing_subscriber::registry::LookupSpan;

/// Returns true if the journal reads the standard error stream. `JOURNAL_STREAM` identifies the
/// stream that it reads, because a process may inherit the variable but have another stream.
pub(super) fn is_journal_stream() -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let stream = std::fs::metadata("/proc/self/fd/2");
    stream.is_ok_and(|file| named == format!("{}:{}", file.dev(), file.ino()))
}

/// Field format that escapes control characters. Text from files, peers and the command line can
/// neither start another line nor disturb a terminal.
pub(super) struct SingleLineFields;

impl<'writer> FormatFields<'writer> for SingleLineFields {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        let mut plain = String::new();
        DefaultFields::new().format_fields(Writer::new(&mut plain), fields)?;
        writer.write_str(&escape::text(&plain))
    }
}

/// Event format for the journal: the level is a syslog priority in front of the line. There is no
/// time, because the journal records it.
pub(super) struct JournalLine(Format<Full, ()>);

impl JournalLine {
    pub(super) fn new() -> Self {
        Self(format().without_time().with_target(false).with_level(false).with_ansi(false))
    }
}

impl<S, N> FormatEvent<S, N> for JournalLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// Returns the syslog priority of a level.
pub(super) fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}
