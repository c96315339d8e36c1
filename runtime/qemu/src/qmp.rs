//! QEMU's machine protocol: lines of JSON; what of it we say and understand.

use serde::Deserialize;

/// Longest line that QEMU may send.
const LINE: usize = 256 * 1024;

/// What QEMU says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// The answer to the oldest command that has none.
    Answer(Result<(), String>),
    /// The guest ended, by itself or not: QEMU's word for why.
    Shutdown(String),
    /// The guest's kernel said that it panicked.
    Panicked,
    /// The greeting, and news that do not matter here.
    Other,
}

/// A command without arguments, as a line.
pub(crate) fn command(name: &str) -> String {
    format!("{{\"execute\":\"{name}\"}}\n")
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "return")]
    returned: Option<serde_json::Value>,
    error: Option<Failure>,
    event: Option<String>,
    #[serde(default)]
    data: Data,
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

#[derive(Default, Deserialize)]
struct Data {
    reason: Option<String>,
}

/// Collects bytes into messages.
#[derive(Debug, Default)]
pub(crate) struct Reader(Vec<u8>);

/// QEMU sent what is no line of its protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("QEMU broke its protocol")]
pub(crate) struct Broken;

impl Reader {
    /// The messages that `bytes` complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Message>, Broken> {
        self.0.extend_from_slice(bytes);
        let mut messages = Vec::new();
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            if !line.trim_ascii().is_empty() {
                messages.push(parse(&line)?);
            }
        }
        match self.0.len() > LINE {
            true => Err(Broken),
            false => Ok(messages),
        }
    }
}

fn parse(line: &[u8]) -> Result<Message, Broken> {
    let line: Line = serde_json::from_slice(line).map_err(|_| Broken)?;
    Ok(match line {
        Line {
            event: Some(event),
            data,
            ..
        } => match event.as_str() {
            "SHUTDOWN" => Message::Shutdown(data.reason.unwrap_or_default()),
            "GUEST_PANICKED" => Message::Panicked,
            _ => Message::Other,
        },
        Line {
            error: Some(Failure { desc }),
            ..
        } => Message::Answer(Err(desc)),
        Line {
            returned: Some(_), ..
        } => Message::Answer(Ok(())),
        _ => Message::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart_however_they_are_cut() {
        let text = concat!(
            r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}"#,
            "\r\n",
            r#"{"return": {}}"#,
            "\r\n",
            r#"{"timestamp": {"seconds": 1}, "event": "STOP"}"#,
            "\r\n",
            r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
            "\r\n",
            r#"{"event": "GUEST_PANICKED", "data": {"action": "pause"}}"#,
            "\r\n",
            r#"{"error": {"class": "GenericError", "desc": "no"}}"#,
            "\r\n",
        );
        let mut reader = Reader::default();
        let found: Vec<Message> = text
            .as_bytes()
            .chunks(7)
            .flat_map(|bytes| reader.push(bytes).unwrap())
            .collect();
        let expected = [
            Message::Other,
            Message::Answer(Ok(())),
            Message::Other,
            Message::Shutdown("guest-reset".to_owned()),
            Message::Panicked,
            Message::Answer(Err("no".to_owned())),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn nonsense_and_endless_lines_are_refused() {
        assert_eq!(Reader::default().push(b"hello\n"), Err(Broken));
        assert_eq!(Reader::default().push(&vec![b' '; LINE + 1]), Err(Broken));
    }
}
