//! System-call filters: OCI's seccomp profile as a BPF program (runtime-spec, config-linux.md, "Seccomp").
//!
//! One section per architecture of the profile; in it first the calls that are decided by their number, in
//! ranges, then those decided by arguments, then the default. Names that no table knows are left out, as
//! other runtimes do, since profiles name calls of kernels to come.
//!
//! Not here: `SCMP_ACT_NOTIFY`, whose listener would have to be on the host; such a profile is refused.

mod bpf;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::str::FromStr;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall,
};

use crate::sys;

/// A profile that cannot become a filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CompileError {
    /// `SCMP_ACT_NOTIFY` or a listener.
    #[error("the system-call filter has a notification listener, which a container in a VM cannot have")]
    Notify,
    /// An argument beyond the sixth.
    #[error("the system-call filter names argument {0}; there are six, from 0 on")]
    Argument(usize),
    /// More than the kernel takes.
    #[error("the system-call filter needs {0} instructions; the kernel takes 4096")]
    TooLong(usize),
}

/// A filter that can be loaded.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u64,
}

impl Filter {
    /// Compiles a profile for this machine.
    ///
    /// # Errors
    /// Fails if the profile needs something that cannot be had; see [`CompileError`].
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, CompileError> {
        let rules = profile.syscalls().as_deref().unwrap_or_default();
        let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
        if profile.listener_path().is_some()
            || notifies(profile.default_action())
            || rules.iter().any(|rule| notifies(rule.action()))
        {
            return Err(CompileError::Notify);
        }
        let mut program = bpf::Program::default();
        program.load(bpf::ARCH_OFFSET);
        for machine in machines(profile) {
            let section = section(profile, rules, machine)?;
            program.section(machine.audit, &section);
        }
        program.ret(KILL_PROCESS);
        let program = program.finish();
        if program.len() > MOST_INSTRUCTIONS {
            return Err(CompileError::TooLong(program.len()));
        }
        Ok(Self {
            program,
            flags: flags(profile),
        })
    }

    /// Puts the filter on the calling thread, for good.
    ///
    /// # Errors
    /// As seccomp(2): without `no_new_privs` it takes `CAP_SYS_ADMIN`.
    pub(crate) fn load(&self) -> std::io::Result<()> {
        sys::seccomp_set_filter(&self.program, self.flags)
    }
}

/// An architecture whose calls may reach the filter.
#[derive(Clone, Copy)]
struct Machine {
    /// `AUDIT_ARCH_*`, include/uapi/linux/audit.h.
    audit: u32,
    /// The number of a call.
    number: fn(&str) -> Option<u32>,
}

const X86_64: Machine = Machine {
    audit: 0xc000_003e,
    number: |name| number(syscalls::x86_64::Sysno::from_str(name).ok()?.id()),
};
const X86: Machine = Machine {
    audit: 0x4000_0003,
    number: |name| number(syscalls::x86::Sysno::from_str(name).ok()?.id()),
};
const AARCH64: Machine = Machine {
    audit: 0xc000_00b7,
    number: |name| number(syscalls::aarch64::Sysno::from_str(name).ok()?.id()),
};

fn number(id: i32) -> Option<u32> {
    u32::try_from(id).ok()
}

/// The machines of a profile that this one can run; its own is always among them.
fn machines(profile: &LinuxSeccomp) -> Vec<Machine> {
    let (own, other) = match std::env::consts::ARCH {
        "aarch64" => (AARCH64, None),
        _ => (X86_64, Some((Arch::ScmpArchX86, X86))),
    };
    let listed = profile.architectures().as_deref().unwrap_or_default();
    let other = other
        .filter(|(arch, _)| listed.contains(arch))
        .map(|(_, machine)| machine);
    std::iter::once(own).chain(other).collect()
}

/// What is decided by one rule for one call.
struct Conditional<'a> {
    arguments: Vec<&'a LinuxSeccompArg>,
    action: u32,
}

fn section(
    profile: &LinuxSeccomp,
    rules: &[LinuxSyscall],
    machine: Machine,
) -> Result<bpf::Program, CompileError> {
    let mut calls: BTreeMap<u32, Vec<Conditional<'_>>> = BTreeMap::new();
    for rule in rules {
        let action = action(rule.action(), rule.errno_ret());
        let alternatives = alternatives(rule.args().as_deref().unwrap_or_default())?;
        for number in rule.names().iter().filter_map(|name| (machine.number)(name)) {
            calls
                .entry(number)
                .or_default()
                .extend(alternatives.iter().map(|arguments| Conditional {
                    arguments: arguments.clone(),
                    action,
                }));
        }
    }
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut program = bpf::Program::default();
    program.load(bpf::NUMBER_OFFSET);
    if machine.audit == X86_64.audit {
        // x32 calls come with the architecture of the others and numbers from here on; the rules are not
        // about them, so they must not pass by missing all rules.
        program.when_from(X32_BIT, ERRNO | libc::ENOSYS.unsigned_abs());
    }
    if let (true, Some((highest, _))) = (says_no(default), calls.last_key_value()) {
        // Calls that are newer than the profile: programs fall back on ENOSYS, and on nothing else.
        program.when_from(highest.saturating_add(1), ERRNO | libc::ENOSYS.unsigned_abs());
    }
    for (range, action) in ranges(&calls) {
        program.when_in(range, action);
    }
    for (number, rules) in &calls {
        if rules.first().is_some_and(|rule| rule.arguments.is_empty()) {
            continue; // decided above
        }
        let mut body = bpf::Program::default();
        for rule in rules {
            body.when_all(&rule.arguments, rule.action);
        }
        body.ret(default);
        program.when_number(*number, &body);
    }
    program.ret(default);
    Ok(program)
}

/// The conditions of a rule, as alternatives that each need all of theirs. Several conditions on the same
/// argument are alternatives: that is how engines' profiles are meant.
fn alternatives(arguments: &[LinuxSeccompArg]) -> Result<Vec<Vec<&LinuxSeccompArg>>, CompileError> {
    if let Some(beyond) = arguments.iter().find(|argument| argument.index() > 5) {
        return Err(CompileError::Argument(beyond.index()));
    }
    let mut seen = [0_u32; 6];
    for argument in arguments {
        if let Some(count) = seen.get_mut(argument.index()) {
            *count = count.saturating_add(1);
        }
    }
    Ok(if seen.iter().any(|count| *count > 1) {
        arguments.iter().map(|argument| vec![argument]).collect()
    } else {
        vec![arguments.iter().collect()]
    })
}

/// Adjacent numbers that are decided alike, by their number alone.
fn ranges(calls: &BTreeMap<u32, Vec<Conditional<'_>>>) -> Vec<(RangeInclusive<u32>, u32)> {
    let mut ranges: Vec<(RangeInclusive<u32>, u32)> = Vec::new();
    for (number, rules) in calls {
        let Some(rule) = rules.first().filter(|rule| rule.arguments.is_empty()) else {
            continue;
        };
        match ranges.last_mut() {
            Some((range, action))
                if *action == rule.action && range.end().checked_add(1) == Some(*number) =>
            {
                *range = *range.start()..=*number;
            }
            _ => ranges.push((*number..=*number, rule.action)),
        }
    }
    ranges
}

/// An action as the filter returns it; an error number is 16 bits of it.
fn action(action: LinuxSeccompAction, errno: Option<u32>) -> u32 {
    action.as_u32(errno.map(|errno| errno & 0xffff))
}

/// Whether an action keeps the call from happening for want of a rule.
fn says_no(action: u32) -> bool {
    let kind = action & 0xffff_0000;
    (kind == ERRNO && action != ERRNO | libc::ENOSYS.unsigned_abs())
        || kind == KILL_PROCESS
        || kind == KILL_THREAD
}

fn flags(profile: &LinuxSeccomp) -> u64 {
    match profile.flags() {
        // As other runtimes: without a list, no mitigation that slows the container down.
        None => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        Some(listed) => listed.iter().fold(0, |flags, flag| {
            flags
                | match flag {
                    LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                        libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                    }
                    // One thread, and no listener.
                    LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                    | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
                }
        }),
    }
}

/// Return values of a filter, include/uapi/linux/seccomp.h.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0x0000_0000;
const ERRNO: u32 = 0x0005_0000;
/// `__X32_SYSCALL_BIT`, arch/x86/include/uapi/asm/unistd.h.
const X32_BIT: u32 = 0x4000_0000;
/// `BPF_MAXINSNS`, include/uapi/linux/bpf_common.h.
const MOST_INSTRUCTIONS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    fn profile(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).unwrap()
    }

    /// Runs `probe` in a thread under the filter.
    fn under<T: Send + 'static>(json: &str, probe: impl FnOnce() -> T + Send + 'static) -> T {
        let filter = Filter::compile(&profile(json)).unwrap();
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            filter.load().unwrap();
            probe()
        })
        .join()
        .unwrap()
    }

    fn umask_like(value: u32) -> Result<(), Errno> {
        // A call with one argument and no effect: a priority of a kind that the kernel does not know.
        rustix::process::getpriority_process(rustix::process::Pid::from_raw(i32::try_from(value).unwrap()))
            .map(drop)
    }

    #[test]
    fn a_listed_call_gets_its_own_error_and_others_pass() {
        let result = under(
            r#"{"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["sethostname", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#,
            || (rustix::system::sethostname(b"x"), rustix::fs::stat("/").is_ok()),
        );
        assert_eq!(result, (Err(Errno::OPNOTSUPP), true));
    }

    #[test]
    fn arguments_decide_with_every_operator() {
        // getpriority(PRIO_PROCESS, pid): the second argument is the pid.
        let own = std::process::id();
        for (op, value, two, denied) in [
            ("EQ", own, 0, true),
            ("EQ", own + 1, 0, false),
            ("NE", own, 0, false),
            ("NE", own + 1, 0, true),
            ("GT", own - 1, 0, true),
            ("GT", own, 0, false),
            ("GE", own, 0, true),
            ("GE", own + 1, 0, false),
            ("LT", own + 1, 0, true),
            ("LT", own, 0, false),
            ("LE", own, 0, true),
            ("LE", own - 1, 0, false),
            ("MASKED_EQ", 1, own & 1, true),
            ("MASKED_EQ", 1, (own & 1) ^ 1, false),
        ] {
            let json = format!(
                r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["getpriority"],
                    "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                    "args": [{{"index": 1, "value": {value}, "valueTwo": {two}, "op": "SCMP_CMP_{op}"}}]}}]}}"#
            );
            let result = under(&json, move || umask_like(own));
            let want = if denied { Err(Errno::OPNOTSUPP) } else { Ok(()) };
            assert_eq!(result, want, "{op} {value} {two}");
        }
    }

    #[test]
    fn values_beyond_32_bits_are_compared_whole() {
        // lseek(fd, offset, whence) on a pipe fails with ESPIPE unless the filter comes first.
        let high = (1_u64 << 40) + 7;
        for (op, value, denied) in [
            ("EQ", high, true),
            ("EQ", 7, false),
            ("GT", 7, true),
            ("GT", high - 1, true),
            ("LT", high + (1 << 40), true),
            ("LT", 7, false),
            ("NE", 7, true),
        ] {
            let json = format!(
                r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["lseek"],
                    "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                    "args": [{{"index": 1, "value": {value}, "op": "SCMP_CMP_{op}"}}]}}]}}"#
            );
            let result = under(&json, move || {
                let (read, _write) = rustix::pipe::pipe().unwrap();
                rustix::fs::seek(&read, rustix::fs::SeekFrom::Start(high)).map(drop)
            });
            let want = if denied { Errno::OPNOTSUPP } else { Errno::SPIPE };
            assert_eq!(result, Err(want), "{op} {value}");
        }
    }

    #[test]
    fn several_conditions_on_one_argument_are_alternatives() {
        let own = std::process::id();
        let json = format!(
            r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["getpriority"],
                "action": "SCMP_ACT_ERRNO", "errnoRet": 95, "args": [
                    {{"index": 1, "value": 4294967295, "op": "SCMP_CMP_EQ"}},
                    {{"index": 1, "value": {own}, "op": "SCMP_CMP_EQ"}}]}}]}}"#
        );
        assert_eq!(under(&json, move || umask_like(own)), Err(Errno::OPNOTSUPP));
    }

    #[test]
    fn a_call_newer_than_the_profile_does_not_exist_rather_than_being_forbidden() {
        let profile = profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read", "openat"], "action": "SCMP_ACT_ALLOW"}]}"#,
        );
        let filter = Filter::compile(&profile).unwrap();
        let call = |number| bpf::run(&filter.program, X86_64.audit, number, [0; 6]);
        let openat = (X86_64.number)("openat").unwrap();
        assert_eq!(call(openat), LinuxSeccompAction::ScmpActAllow.as_u32(None));
        assert_eq!(call(openat - 1), ERRNO | 1);
        assert_eq!(call(openat + 1), ERRNO | libc::ENOSYS.unsigned_abs());
    }

    #[test]
    fn calls_of_another_architecture_end_the_process_unless_it_is_listed() {
        let text = |architectures: &str| {
            format!(
                r#"{{"defaultAction": "SCMP_ACT_ALLOW", "architectures": [{architectures}],
                    "syscalls": [{{"names": ["mount"], "action": "SCMP_ACT_ERRNO"}}]}}"#
            )
        };
        let own = Filter::compile(&profile(&text("\"SCMP_ARCH_X86_64\""))).unwrap();
        let both = Filter::compile(&profile(&text("\"SCMP_ARCH_X86_64\", \"SCMP_ARCH_X86\""))).unwrap();
        let mount = (X86.number)("mount").unwrap();
        assert_eq!(bpf::run(&own.program, X86.audit, mount, [0; 6]), KILL_PROCESS);
        assert_eq!(bpf::run(&both.program, X86.audit, mount, [0; 6]), ERRNO | 1);
        let x32 = (X86_64.number)("mount").unwrap() | X32_BIT;
        assert_eq!(
            bpf::run(&own.program, X86_64.audit, x32, [0; 6]),
            ERRNO | libc::ENOSYS.unsigned_abs()
        );
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        for (json, want) in [
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, CompileError::Notify),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x.sock"}"#,
                CompileError::Notify,
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_LOG",
                    "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
                CompileError::Argument(6),
            ),
        ] {
            assert_eq!(Filter::compile(&profile(json)).unwrap_err(), want);
        }
    }
}
