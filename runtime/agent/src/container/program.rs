//! Environment, working directory and program of a process.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use crate::failure::{At, failure, failure_with, plain};
use crate::sys;

/// Everything execve(2) needs.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds the program of `process`, as the user that it will run as, from its working directory.
    ///
    /// # Errors
    /// Fails if there is none (`ENOENT`) or it may not be run (`EACCES`), in the words that engines look for.
    pub(crate) fn find(process: &Process) -> Result<Self, Failure> {
        let args = process.args().as_deref().unwrap_or_default();
        let name = args
            .first()
            .filter(|name| !name.is_empty())
            .ok_or_else(|| failure_with(Stage::Program, Errno::INVAL, "the process has no arguments"))?;
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            env.push(format!("HOME={}", home_of(process.user().uid())));
        }
        let search = env
            .iter()
            .rev()
            .find_map(|entry| entry.strip_prefix("PATH="))
            .unwrap_or_default();
        let path = if name.contains('/') {
            check(name, name)?
        } else {
            search_path(name, search)?
        };
        Ok(Self {
            path: c_string(path.as_os_str().as_bytes())?,
            args: args
                .iter()
                .map(|arg| c_string(arg.as_bytes()))
                .collect::<Result<_, _>>()?,
            env: env
                .iter()
                .map(|entry| c_string(entry.as_bytes()))
                .collect::<Result<_, _>>()?,
            name: name.clone(),
        })
    }

    /// Becomes the program; returns only on failure.
    pub(crate) fn execute(&self) -> Failure {
        let err = sys::execve(&self.path, &self.args, &self.env);
        Failure {
            stage: Stage::Program,
            message: format!("exec: {:?}: {}", self.name, lower(&plain(&err))),
            errno: err.raw_os_error(),
        }
    }
}

/// Enters the working directory, which is made if it is missing.
///
/// # Errors
/// Fails if it is no directory, may not be entered, or is not inside the container's root.
pub(crate) fn enter_directory(path: &Path) -> Result<(), Failure> {
    let cannot = || format!("cannot enter the working directory {}", path.display());
    if !path.is_absolute() {
        return Err(Errno::INVAL).at(Stage::WorkingDirectory, cannot);
    }
    match rustix::process::chdir(path) {
        Err(Errno::NOENT) => {
            std::fs::create_dir_all(path).at(Stage::WorkingDirectory, || {
                format!("cannot create the working directory {}", path.display())
            })?;
            rustix::process::chdir(path).at(Stage::WorkingDirectory, cannot)?;
        }
        other => other.at(Stage::WorkingDirectory, cannot)?,
    }
    // getcwd(2) gives no absolute path for a directory that cannot be reached from the root: one that a
    // descriptor left over from outside leads to.
    let inside = std::env::current_dir().is_ok_and(|current| current.is_absolute());
    if inside {
        Ok(())
    } else {
        Err(Errno::XDEV).at(Stage::WorkingDirectory, cannot)
    }
}

fn search_path(name: &str, search: &str) -> Result<PathBuf, Failure> {
    let mut forbidden = None;
    for directory in search.split(':') {
        // An empty element is the working directory, which this name does not reach on purpose.
        if directory.is_empty() {
            continue;
        }
        match check(name, &format!("{directory}/{name}")) {
            Ok(found) => return Ok(found),
            Err(failed) if failed.errno == Some(libc::EACCES) => forbidden = forbidden.or(Some(failed)),
            Err(_) => {}
        }
    }
    Err(forbidden.unwrap_or_else(|| {
        let message = format!("exec: {name:?}: executable file not found in $PATH");
        failure_with(Stage::Program, Errno::NOENT, message)
    }))
}

/// Whether there is a regular file at `path` that this user may execute.
fn check(name: &str, path: &str) -> Result<PathBuf, Failure> {
    let stat = rustix::fs::stat(path).map_err(|errno| {
        let cause = lower(&plain(&errno.into()));
        failure_with(
            Stage::Program,
            errno,
            format!("exec: {name:?}: stat {path}: {cause}"),
        )
    })?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let may = rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS);
    match may {
        Ok(()) if is_file => Ok(path.into()),
        _ => Err(failure_with(
            Stage::Program,
            Errno::ACCESS,
            format!("exec: {name:?}: permission denied"),
        )),
    }
}

/// The home directory that `/etc/passwd` gives the user, or `/`.
fn home_of(uid: u32) -> String {
    // The container wrote this file: it is read to a limit, and a FIFO in its place is not waited for.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
    let mut text = Vec::new();
    if let Ok(file) = rustix::fs::open("/etc/passwd", flags, rustix::fs::Mode::empty())
        && rustix::fs::fstat(&file)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
        && File::from(file)
            .take(PASSWD_LIMIT)
            .read_to_end(&mut text)
            .is_err()
    {
        text.clear();
    }
    home_in(&String::from_utf8_lossy(&text), uid).unwrap_or_else(|| "/".to_owned())
}

/// Finds the sixth field of the line whose third is `uid` (passwd(5)).
fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let matches = fields.nth(2)?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (matches && !home.is_empty()).then(|| home.to_owned())
    })
}

fn c_string(bytes: &[u8]) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| failure(Stage::Program, "an argument contains a zero byte"))
}

/// The system's message in the case that other runtimes print it in, which engines compare with.
fn lower(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// Largest part of `/etc/passwd` that is read.
const PASSWD_LIMIT: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        let mut process = Process::default();
        process.set_args(Some(args.iter().map(|arg| (*arg).to_owned()).collect()));
        process.set_env(Some(env.iter().map(|entry| (*entry).to_owned()).collect()));
        process
    }

    #[test]
    fn a_name_is_looked_up_in_the_path_of_the_process() {
        let program = Program::find(&process(&["sh", "-c"], &["PATH=/nowhere:/bin"])).unwrap();
        assert_eq!(program.path.as_c_str(), c"/bin/sh");
        assert_eq!(program.args.len(), 2);
        assert!(
            program
                .env
                .iter()
                .any(|entry| entry.to_bytes().starts_with(b"HOME="))
        );
    }

    #[test]
    fn failures_use_the_words_that_engines_look_for() {
        let dir = tempfile::tempdir().unwrap();
        let plain_file = dir.path().join("data");
        std::fs::write(&plain_file, "").unwrap();
        let (plain_file, dir) = (plain_file.to_str().unwrap(), dir.path().to_str().unwrap());
        for (name, path, errno, words) in [
            (
                "no-such",
                "/bin",
                libc::ENOENT,
                "exec: \"no-such\": executable file not found in $PATH",
            ),
            (
                "sh",
                "",
                libc::ENOENT,
                "exec: \"sh\": executable file not found in $PATH",
            ),
            (
                "/no/such",
                "/bin",
                libc::ENOENT,
                "exec: \"/no/such\": stat /no/such: no such file or directory",
            ),
            (plain_file, "/bin", libc::EACCES, "permission denied"),
            ("data", dir, libc::EACCES, "exec: \"data\": permission denied"),
            ("/", "/bin", libc::EACCES, "exec: \"/\": permission denied"),
        ] {
            let failed = Program::find(&process(&[name], &[&format!("PATH={path}")])).unwrap_err();
            assert_eq!(
                (failed.stage, failed.errno),
                (Stage::Program, Some(errno)),
                "{name}"
            );
            assert!(failed.message.contains(words), "{}", failed.message);
        }
    }

    #[test]
    fn no_arguments_and_zero_bytes_are_refused() {
        assert!(Program::find(&process(&[], &[])).is_err());
        assert!(Program::find(&process(&["/bin/sh", "a\0b"], &[])).is_err());
    }

    #[test]
    fn the_home_directory_comes_from_the_line_of_the_user() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33:web:/var/www:/bin/sh\nx:x:44:44:::\n";
        assert_eq!(home_in(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_in(passwd, 44), None);
        assert_eq!(home_in(passwd, 7), None);
    }
}
