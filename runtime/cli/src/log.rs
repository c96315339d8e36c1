//! Messages: where runc's go and in its formats, because engines read them.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::sync::Mutex;

use anyhow::Context as _;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::arguments::{Global, LogFormat};
use crate::failure::Result;

/// Where an error is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// On standard error, for people.
    Plain,
    /// On standard error, as a log line.
    Stderr,
    /// In the log, and on standard error for people.
    File,
}

/// Sets the log of a command up.
pub(crate) fn start(global: &Global) -> Result<Style> {
    let level = match global.debug {
        true => Level::DEBUG,
        // What went well is not said on a terminal.
        false if global.log.is_none() => Level::WARN,
        false => Level::INFO,
    };
    let subscriber = tracing_subscriber::fmt().with_max_level(level);
    let (shape, style) = match (global.log_format, &global.log) {
        (LogFormat::Json, None) => (Shape::Json, Style::Stderr),
        (LogFormat::Json, Some(_)) => (Shape::Json, Style::File),
        (LogFormat::Text, None) => (Shape::Plain, Style::Plain),
        (LogFormat::Text, Some(_)) => (Shape::Text, Style::File),
    };
    let subscriber = subscriber.event_format(shape);
    match &global.log {
        None => subscriber.with_writer(std::io::stderr).init(),
        Some(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .with_context(|| format!("cannot open the log {}; see --log", path.display()))?;
            subscriber.with_writer(Mutex::new(file)).init();
        }
    }
    Ok(style)
}

/// The log of a sandbox's own processes is the file that is their standard error.
pub(crate) fn to_stderr() {
    let filter = std::env::var("CAISSON_LOG").unwrap_or_else(|_| "info".to_owned());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(EnvFilter::new(filter))
        .init();
}

/// How one message is written.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// `caisson: message`
    Plain,
    /// `time="…" level=… msg="…"`
    Text,
    /// `{"level":"…","msg":"…","time":"…"}`
    Json,
}

impl<S, N> FormatEvent<S, N> for Shape
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = Message::default();
        event.record(&mut message);
        let text = format!("{}{}", message.text, message.fields);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            _ => "debug",
        };
        match self {
            Self::Plain => writeln!(writer, "caisson: {text}"),
            Self::Text => writeln!(writer, "time={:?} level={level} msg={text:?}", now()),
            Self::Json => {
                let line = serde_json::json!({"level": level, "msg": text, "time": now()});
                writeln!(writer, "{line}")
            }
        }
    }
}

/// An event's text, and its fields as `, key: value`.
#[derive(Default)]
struct Message {
    text: String,
    fields: String,
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.text, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }
}

/// Seconds are enough: runc's log has no more.
fn now() -> String {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(0)
        .unwrap_or(now)
        .format(&Rfc3339)
        .unwrap_or_default()
}
