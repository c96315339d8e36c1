//! Kernel parameters.

use std::path::PathBuf;

use caisson_wire::agent::{Failure, Stage};
use rustix::io::Errno;

use crate::failure::{At, failure_with};

/// Sets a kernel parameter, as seen from the namespaces of the caller. Needs the agent's `/proc`.
///
/// # Errors
/// Fails if there is none of that name, or the kernel does not take the value.
pub(crate) fn set(key: &str, value: &str) -> Result<(), Failure> {
    let path = path(key).ok_or_else(|| {
        failure_with(
            Stage::Sysctl,
            Errno::INVAL,
            format!("{key:?} is no kernel parameter"),
        )
    })?;
    std::fs::write(path, value).at(Stage::Sysctl, || format!("cannot set {key} to {value:?}"))
}

/// The file of a parameter, in either of the spellings of sysctl(8): `a.b/c` and `a/b.c` have a `.` in a
/// component, depending on which separator comes first.
fn path(key: &str) -> Option<PathBuf> {
    let dots_separate = match (key.find('.'), key.find('/')) {
        (Some(dot), Some(slash)) => dot < slash,
        (None, _) => false,
        (Some(_), None) => true,
    };
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let relative: String = if dots_separate {
        key.chars().map(swap).collect()
    } else {
        key.to_owned()
    };
    let proper = !relative.is_empty()
        && relative.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !relative.contains('\0');
    proper.then(|| PathBuf::from("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_name_the_same_file() {
        for (key, want) in [
            ("net.ipv4.ip_forward", Some("/proc/sys/net/ipv4/ip_forward")),
            ("net/ipv4/ip_forward", Some("/proc/sys/net/ipv4/ip_forward")),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ),
            ("", None),
            ("/etc/passwd", None),
            ("a/../../etc/passwd", None),
            ("a//b", None),
        ] {
            assert_eq!(path(key), want.map(PathBuf::from), "{key:?}");
        }
    }
}
