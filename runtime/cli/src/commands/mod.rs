//! The commands, one module each.

pub(crate) mod check;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod features;
pub(crate) mod kill;
pub(crate) mod lifecycle;
pub(crate) mod list;
mod order;
pub(crate) mod ps;
pub(crate) mod run;
pub(crate) mod spec;
pub(crate) mod state;
pub(crate) mod update;

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use caisson_sandbox::ContainerId;

use crate::arguments::{Command, CommandLine};
use crate::failure::Result;
use crate::places;

/// Does what the command line says.
pub(crate) fn carry_out(line: CommandLine) -> Result<ExitCode> {
    let CommandLine { global, command, .. } = line;
    // These need no containers, and so no root directory.
    match command {
        Command::Spec(options) => return options.run(),
        Command::Features(options) => return options.run(),
        Command::Check(options) => return options.run(&global),
        _ => {}
    }
    let runtime = places::runtime(&global)?;
    match command {
        Command::Create(options) => options.run(&global, &runtime),
        Command::Run(options) => options.run(&global, &runtime),
        Command::Exec(options) => options.run(&runtime),
        Command::Start(options) => options.start(&runtime),
        Command::Pause(options) => options.pause(&runtime),
        Command::Resume(options) => options.resume(&runtime),
        Command::State(options) => options.run(&runtime),
        Command::Kill(options) => options.run(&runtime),
        Command::Delete(options) => options.run(&runtime),
        Command::Ps(options) => options.run(&runtime),
        Command::List(options) => options.run(&runtime),
        Command::Update(options) => options.run(&runtime),
        Command::Events(options) => options.run(&runtime),
        Command::Spec(_) | Command::Features(_) | Command::Check(_) => Ok(ExitCode::SUCCESS),
    }
}

/// Prints what was asked for. A reader that has gone away is no failure.
fn print(text: &str) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(err) if err.kind() != io::ErrorKind::BrokenPipe => Err(err).context("cannot write the output")?,
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Columns as wide as their widest cell.
fn table(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .enumerate()
            .map(|(column, cell)| match column + 1 == row.len() {
                true => cell.clone(),
                false => format!("{cell:<wide$}   ", wide = width(column)),
            });
        text.push_str(cells.collect::<String>().trim_end());
        text.push('\n');
    }
    text
}

/// Writes the file by which engines learn of a process: whole or not at all, without a newline, as runc does.
fn write_pid(path: &Path, pid: i32) -> anyhow::Result<()> {
    let context = || format!("cannot write the pid file {}", path.display());
    let name = path.file_name().with_context(context)?;
    let temporary = path.with_file_name(format!(".{}", name.to_string_lossy()));
    std::fs::write(&temporary, pid.to_string())
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(context)
}

fn id(text: &str) -> Result<ContainerId> {
    Ok(ContainerId::try_from(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["ID", "PID"], ["abcd", "1"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "ID     PID\nabcd   1\n");
    }

    #[test]
    fn a_pid_file_has_no_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        write_pid(&path, 42).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"42");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
