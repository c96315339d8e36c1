//! A container's process table, from the agent's own `/proc`.

use std::fs;

use caisson_wire::agent::ProcessInfo;

/// The rows of these processes; those that have ended in the meantime are left out.
pub(crate) fn list(pids: &[i32]) -> Vec<ProcessInfo> {
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    pids.iter()
        .filter_map(|pid| read(*pid, ticks))
        .take(MOST)
        .collect()
}

fn read(pid: i32, ticks: u64) -> Option<ProcessInfo> {
    let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).ok();
    let text = |name: &str| Some(String::from_utf8_lossy(&file(name)?).into_owned());
    let stat = Stat::parse(&text("stat")?)?;
    let status = text("status")?;
    let last_of = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().last()?.parse().ok()
    };
    let uid = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok())?;
    let mut command = file("cmdline").unwrap_or_default();
    command.truncate(LONGEST_COMMAND);
    Some(ProcessInfo {
        pid,
        parent: stat.parent,
        inner_pid: last_of("NSpid:").unwrap_or(pid),
        uid,
        cpu_ms: stat.ticks.saturating_mul(1000) / ticks,
        start_s: stat.start / ticks,
        terminal: terminal(stat.terminal),
        command: if command.is_empty() {
            format!("[{}]", stat.name)
        } else {
            let words = command.strip_suffix(&[0]).unwrap_or(&command);
            String::from_utf8_lossy(words).replace('\0', " ")
        },
    })
}

/// What is taken from `/proc/PID/stat` (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    parent: i32,
    terminal: u32,
    ticks: u64,
    start: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name may contain anything, parentheses and spaces too.
        let (before, after) = text.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let fields: Vec<&str> = after.split_whitespace().collect();
        // Fields are counted from the state, which is the third.
        let field = |number: usize| fields.get(number.checked_sub(3)?).copied();
        let number = |at| field(at)?.parse::<u64>().ok();
        Some(Self {
            name: name.to_owned(),
            parent: field(4)?.parse().ok()?,
            terminal: u32::from_ne_bytes(field(7)?.parse::<i32>().ok()?.to_ne_bytes()),
            ticks: number(14)?.saturating_add(number(15)?),
            start: number(22)?,
        })
    }
}

/// A terminal's number as `ps` prints it.
fn terminal(device: u32) -> String {
    // The minor number's lowest 8 bits come first, then the major number, then the rest of the minor.
    let (major, minor) = (
        (device >> 8) & 0xfff,
        (device & 0xff) | ((device >> 12) & 0xfff00),
    );
    match major {
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        4 if minor < 64 => format!("tty{minor}"),
        4 => format!("ttyS{}", minor - 64),
        5 if minor == 1 => "console".to_owned(),
        _ => "?".to_owned(),
    }
}

/// Rows and bytes of a command line, so that an answer stays below the channel's limit.
const MOST: usize = 2048;
const LONGEST_COMMAND: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "42 (a) b) ( c) S 7 42 42 34817 42 4194304 1 2 3 4 250 50 0 0 20 0 1 0 900 0 0";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                name: "a) b) ( c".to_owned(),
                parent: 7,
                terminal: 34817,
                ticks: 300,
                start: 900,
            })
        );
        assert_eq!(Stat::parse("42 (short) S"), None);
    }

    #[test]
    fn terminals_have_their_usual_names() {
        for (device, name) in [
            (0x8801, "pts/1"),
            (0x0401, "tty1"),
            (0x0440, "ttyS0"),
            (0x0501, "console"),
            (0, "?"),
        ] {
            assert_eq!(terminal(device), name, "{device:#x}");
        }
    }

    #[test]
    fn this_process_is_in_the_table() {
        let own = i32::try_from(std::process::id()).unwrap();
        let rows = list(&[own, i32::MAX]);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].pid, own);
        assert!(!rows[0].command.is_empty());
    }
}
