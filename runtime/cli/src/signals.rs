//! Signals by name and number, as kill(1) takes them.

use anyhow::{Result, bail};

/// First real-time signal that programs may use: glibc keeps 32 and 33 (signal(7)).
const RT_MIN: i32 = 34;
/// Last signal (signal(7)).
const RT_MAX: i32 = 64;

/// The number of a signal given as `SIGTERM`, `TERM`, `term`, `RTMIN+1` or `15`.
pub(crate) fn parse(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        if (1..=RT_MAX).contains(&number) {
            return Ok(number);
        }
        bail!("signal {number} does not exist; signals are from 1 to {RT_MAX}");
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => Some(RT_MIN),
        (Some(offset), _) => offset
            .strip_prefix('+')
            .and_then(|n| n.parse().ok())
            .map(|n: u8| RT_MIN + i32::from(n)),
        (_, Some("")) => Some(RT_MAX),
        (_, Some(offset)) => offset
            .strip_prefix('-')
            .and_then(|n| n.parse().ok())
            .map(|n: u8| RT_MAX - i32::from(n)),
        _ => None,
    };
    match real_time.filter(|number| (RT_MIN..=RT_MAX).contains(number)) {
        Some(number) => Ok(number),
        None => bail!("unknown signal {text:?}; give a name like TERM or a number like 15"),
    }
}

/// signal(7), numbers of x86, ARM and most others.
const NAMES: [(&str, i32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same() {
        for (text, want) in [
            ("SIGTERM", Some(15)),
            ("TERM", Some(15)),
            ("term", Some(15)),
            ("sigKill", Some(9)),
            ("15", Some(15)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX", Some(64)),
            ("RTMAX-1", Some(63)),
            ("RTMIN", Some(34)),
            ("SIGBAR", None),
            ("0", None),
            ("99", None),
            ("-1", None),
            ("", None),
            ("SIG", None),
            ("RTMIN+31", None),
            ("RTMIN+", None),
            ("RTMAX-31", None),
        ] {
            assert_eq!(parse(text).ok(), want, "{text}");
        }
    }
}
