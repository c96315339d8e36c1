//! Resource limits, scheduling, I/O priority, out-of-memory score and execution domain of a process.

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Process, Scheduler,
};
use rustix::io::Errno;

use crate::failure::{At, failure_with};
use crate::sys::{self, SchedAttr};

/// Applies the limits, priorities and score that `process` asks for to the process `pid`, which is root
/// still and waits.
///
/// The agent does this rather than the process: a limit that is too low for the set-up is none of the
/// set-up's business, it takes the rights of the first user namespace, and `/proc` has to be the agent's.
///
/// # Errors
/// Fails with the stage [`Stage::Limits`].
pub(crate) fn apply(pid: i32, process: &Process) -> Result<(), Failure> {
    if let Some(score) = process.oom_score_adj() {
        std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()).at(Stage::Limits, || {
            format!("cannot set the out-of-memory score to {score}")
        })?;
    }
    for limit in process.rlimits().iter().flatten() {
        set_limit(pid, limit)?;
    }
    if let Some(priority) = process.io_priority() {
        let value = io_priority(priority);
        sys::set_io_priority(pid, value).at(Stage::Limits, || {
            format!("cannot set the I/O priority {value:#x}")
        })?;
    }
    if let Some(scheduler) = process.scheduler() {
        sys::sched_setattr(pid, scheduling(scheduler)).at(Stage::Limits, || {
            format!("cannot schedule as {:?}", scheduler.policy())
        })?;
    }
    Ok(())
}

/// Sets the execution domain of this process.
///
/// # Errors
/// Fails with the stage [`Stage::Limits`].
pub(crate) fn set_personality(personality: &LinuxPersonality) -> Result<(), Failure> {
    /// include/uapi/linux/personality.h.
    const PER_LINUX: u32 = 0x0000;
    const PER_LINUX32: u32 = 0x0008;
    let persona = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => PER_LINUX,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    };
    sys::personality(persona).at(Stage::Limits, || "cannot set the execution domain")
}

fn set_limit(pid: i32, limit: &PosixRlimit) -> Result<(), Failure> {
    if limit.soft() > limit.hard() {
        return Err(failure_with(
            Stage::Limits,
            Errno::INVAL,
            format!(
                "cannot set {}: the soft limit {} is above the hard limit {}",
                limit.typ(),
                limit.soft(),
                limit.hard()
            ),
        ));
    }
    sys::set_limit(pid, resource(limit.typ()), limit.soft(), limit.hard()).at(Stage::Limits, || {
        format!(
            "cannot set {} to {} and {}",
            limit.typ(),
            limit.soft(),
            limit.hard()
        )
    })
}

/// Numbers of the resources, include/uapi/asm-generic/resource.h.
fn resource(typ: PosixRlimitType) -> u32 {
    match typ {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

/// The argument of ioprio_set(2): the class in the bits from 13 on.
fn io_priority(priority: &LinuxIOPriority) -> u32 {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    class << 13 | u32::try_from(priority.priority()).unwrap_or_default() & 0x1fff
}

fn scheduling(scheduler: &Scheduler) -> SchedAttr {
    // include/uapi/linux/sched.h.
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    SchedAttr {
        policy,
        flags,
        nice: scheduler.nice().unwrap_or_default(),
        priority: scheduler
            .priority()
            .and_then(|value| u32::try_from(value).ok())
            .unwrap_or_default(),
        runtime: scheduler.runtime().unwrap_or_default(),
        deadline: scheduler.deadline().unwrap_or_default(),
        period: scheduler.period().unwrap_or_default(),
        ..SchedAttr::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_have_the_kernels_numbers() {
        for (typ, want) in [
            (PosixRlimitType::RlimitCpu, libc::RLIMIT_CPU),
            (PosixRlimitType::RlimitNofile, libc::RLIMIT_NOFILE),
            (PosixRlimitType::RlimitNproc, libc::RLIMIT_NPROC),
            (PosixRlimitType::RlimitMemlock, libc::RLIMIT_MEMLOCK),
            (PosixRlimitType::RlimitRttime, libc::RLIMIT_RTTIME),
        ] {
            assert_eq!(i64::from(resource(typ)), i64::from(want), "{typ}");
        }
    }

    #[test]
    fn a_soft_limit_above_the_hard_one_is_refused_before_the_kernel_sees_it() {
        let limit: PosixRlimit =
            serde_json::from_str(r#"{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 5}"#).unwrap();
        assert_eq!(set_limit(0, &limit).unwrap_err().stage, Stage::Limits);
    }

    #[test]
    fn an_io_priority_is_class_and_level() {
        let priority: LinuxIOPriority =
            serde_json::from_str(r#"{"class": "IOPRIO_CLASS_BE", "priority": 4}"#).unwrap();
        assert_eq!(io_priority(&priority), 2 << 13 | 4);
    }
}
