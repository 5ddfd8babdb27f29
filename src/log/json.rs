//! Formats log lines as JSON: one flat object, in which the fields of a connection stand beside
//! those of the event.

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use nbd_telemetry::escape;
use serde_json::{Map, Value};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::{LookupSpan, Scope};

/// Event format that merges fields into one object. The fields have to be formatted as JSON.
pub(super) struct FlatJson;

impl<S, N> FormatEvent<S, N> for FlatJson
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
        let mut fields = Map::new();
        for span in context.event_scope().into_iter().flat_map(Scope::from_root) {
            if let Some(formatted) = span.extensions().get::<FormattedFields<N>>() {
                add(&mut fields, formatted);
            }
        }
        let mut own = String::new();
        context.format_fields(Writer::new(&mut own), event)?;
        add(&mut fields, &own);

        let time = humantime::format_rfc3339_micros(SystemTime::now());
        let level = event.metadata().level();
        let message = fields.remove("message").unwrap_or_default();
        let mut line = format!(r#"{{"timestamp":"{time}","level":"{level}","message":{message}"#);
        for (name, value) in fields {
            write!(line, ",{}:{value}", Value::String(name))?;
        }
        writeln!(writer, "{}}}", escape::json(&line))
    }
}

fn add(fields: &mut Map<String, Value>, object: &str) {
    if let Ok(Value::Object(more)) = serde_json::from_str(object) {
        fields.extend(more);
    }
}
