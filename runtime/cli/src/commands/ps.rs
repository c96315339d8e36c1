//! `caisson ps`.

use std::process::ExitCode;

use anyhow::bail;
use caisson_sandbox::client::Runtime;
use caisson_wire::agent::ProcessInfo;

use crate::arguments::TableFormat;
use crate::failure::Result;

/// Options of `ps`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = TableFormat::Table, value_name = "FORMAT")]
    format: TableFormat,
    /// Options of ps(1): "-o pid,user,cmd" chooses columns, anything else prints all of them
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PS OPTIONS"
    )]
    options: Vec<String>,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let columns = columns(&self.options)?;
        let processes = runtime.processes(&super::id(&self.id)?)?;
        match self.format {
            TableFormat::Json => {
                let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
                super::print(&format!("{}\n", serde_json::to_string(&pids)?))
            }
            TableFormat::Table => {
                let title = columns.iter().map(|column| column.title.to_owned()).collect();
                let cells = |process| columns.iter().map(|column| (column.cell)(process)).collect();
                let rows: Vec<Vec<String>> = std::iter::once(title)
                    .chain(processes.iter().map(cells))
                    .collect();
                super::print(&super::table(&rows))
            }
        }
    }
}

struct Column {
    /// As `-o` has it (ps(1), "STANDARD FORMAT SPECIFIERS").
    names: &'static [&'static str],
    title: &'static str,
    cell: fn(&ProcessInfo) -> String,
}

const UID: Column = Column {
    names: &["uid", "user", "euser", "ruser"],
    title: "UID",
    cell: |p| p.uid.to_string(),
};
const PID: Column = Column {
    names: &["pid", "tgid"],
    title: "PID",
    cell: |p| p.pid.to_string(),
};
const PPID: Column = Column {
    names: &["ppid"],
    title: "PPID",
    cell: |p| p.parent.to_string(),
};
const NSPID: Column = Column {
    names: &["nspid", "hpid"],
    title: "NSPID",
    cell: |p| p.inner_pid.to_string(),
};
const START: Column = Column {
    names: &["stime", "start", "start_time"],
    title: "START",
    cell: |p| clock(p.start_s),
};
const TTY: Column = Column {
    names: &["tty", "tname", "tt"],
    title: "TTY",
    cell: |p| p.terminal.clone(),
};
const TIME: Column = Column {
    names: &["time", "cputime"],
    title: "TIME",
    cell: |p| clock(p.cpu_ms / 1000),
};
const CMD: Column = Column {
    names: &["cmd", "args", "command"],
    title: "CMD",
    cell: |p| printable(&p.command),
};
const COMM: Column = Column {
    names: &["comm", "ucmd", "ucomm"],
    title: "COMMAND",
    cell: |p| program(&p.command),
};
/// Every column there is.
const ALL: [&Column; 9] = [&UID, &PID, &PPID, &NSPID, &START, &TTY, &TIME, &CMD, &COMM];
/// Those of `ps -ef`, and the pid that the container itself sees. START counts from the guest's boot.
const FULL: [&Column; 8] = [&UID, &PID, &PPID, &NSPID, &START, &TTY, &TIME, &CMD];

fn columns(options: &[String]) -> anyhow::Result<Vec<&'static Column>> {
    let mut chosen = Vec::new();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let list = match option.trim_start_matches('-') {
            "o" | "eo" | "format" => options.next().map(String::as_str),
            word => word.strip_prefix("format=").or_else(|| {
                let after = word.strip_prefix("eo").or_else(|| word.strip_prefix('o'))?;
                option.starts_with('-').then_some(after)
            }),
        };
        for name in list
            .unwrap_or_default()
            .split(',')
            .filter(|name| !name.is_empty())
        {
            let name = name.split('=').next().unwrap_or(name);
            match ALL.iter().find(|column| column.names.contains(&name)) {
                Some(column) => chosen.push(*column),
                None => bail!(
                    "unknown column {name:?}; there are {}",
                    ALL.map(|column| column.names.first().copied().unwrap_or_default())
                        .join(", ")
                ),
            }
        }
    }
    Ok(match chosen.is_empty() {
        true => FULL.to_vec(),
        false => chosen,
    })
}

fn clock(seconds: u64) -> String {
    format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// A container chooses its command lines; they may not steer the terminal of whoever looks.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn program(command: &str) -> String {
    let first = command.split(' ').next().unwrap_or_default();
    printable(first.rsplit('/').next().unwrap_or(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titles(options: &[&str]) -> Option<Vec<&'static str>> {
        let options: Vec<String> = options.iter().map(|text| (*text).to_owned()).collect();
        Some(
            columns(&options)
                .ok()?
                .iter()
                .map(|column| column.title)
                .collect(),
        )
    }

    #[test]
    fn columns_are_chosen_as_with_ps() {
        let full: Vec<&str> = FULL.iter().map(|column| column.title).collect();
        for (options, want) in [
            (&[][..], Some(full.clone())),
            (&["-ef"], Some(full.clone())),
            (&["aux"], Some(full)),
            (&["-o", "pid,cmd"], Some(vec!["PID", "CMD"])),
            (&["-opid"], Some(vec!["PID"])),
            (&["-eo", "pid,comm="], Some(vec!["PID", "COMMAND"])),
            (&["-o", "nonsense"], None),
        ] {
            assert_eq!(titles(options), want, "{options:?}");
        }
    }

    #[test]
    fn a_command_line_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[2J\nb"), "a?[2J?b");
        assert_eq!(program("/bin/sh -c x"), "sh");
        assert_eq!(clock(3725), "01:02:05");
    }
}
