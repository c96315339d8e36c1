//! User, groups and capabilities of a process.
//!
//! The system calls here change the calling thread alone, which is the whole process: it has one thread.

use std::collections::HashSet;

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::{Capability, LinuxCapabilities, User};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::failure::At;

/// The five sets of a process (capabilities(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

impl Capabilities {
    /// The sets that a configuration lists; none is no capability at all.
    pub(crate) fn of(listed: Option<&LinuxCapabilities>) -> Self {
        let set = |pick: fn(&LinuxCapabilities) -> &Option<HashSet<Capability>>| {
            listed
                .and_then(|listed| pick(listed).as_ref())
                .map(|names| names.iter().map(|name| bit(*name)).collect())
                .unwrap_or_else(CapabilitySet::empty)
        };
        Self {
            bounding: set(LinuxCapabilities::bounding),
            effective: set(LinuxCapabilities::effective),
            permitted: set(LinuxCapabilities::permitted),
            inheritable: set(LinuxCapabilities::inheritable),
            ambient: set(LinuxCapabilities::ambient),
        }
    }

    /// Gives up what is in none of the sets but `kept`, which is taken away by [`Capabilities::settle`].
    fn narrow(self, kept: CapabilitySet) -> rustix::io::Result<()> {
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: self.effective.union(kept),
                permitted: self.permitted.union(kept),
                inheritable: self.inheritable,
            },
        )
    }

    /// Takes the last step to exactly these sets.
    ///
    /// # Errors
    /// As capset(2) and prctl(2).
    pub(crate) fn settle(self) -> Result<(), Failure> {
        let cannot = || "cannot set the capabilities";
        self.narrow(CapabilitySet::empty())
            .at(Stage::Credentials, cannot)?;
        rustix::thread::clear_ambient_capability_set().at(Stage::Credentials, cannot)?;
        for one in self.ambient.iter() {
            // What is not both permitted and inheritable cannot be ambient; as elsewhere that is no error,
            // since engines list the same names in all sets for users that do not get them.
            match rustix::thread::configure_capability_in_ambient_set(one, true) {
                Ok(()) | Err(Errno::PERM | Errno::INVAL) => {}
                other => other.at(Stage::Credentials, cannot)?,
            }
        }
        Ok(())
    }
}

/// Becomes `user` with `capabilities`, and keeps `kept` besides until [`Capabilities::settle`].
///
/// # Errors
/// Fails if a user or group id has no mapping in the user namespace, or a capability is not there to keep.
pub(crate) fn become_user(
    user: &User,
    capabilities: Capabilities,
    kept: CapabilitySet,
) -> Result<(), Failure> {
    let cannot = || "cannot limit the capabilities";
    for one in CapabilitySet::all_known()
        .difference(capabilities.bounding)
        .iter()
    {
        match rustix::thread::remove_capability_from_bounding_set(one) {
            Ok(()) | Err(Errno::INVAL) => {} // a capability that this kernel does not know
            other => other.at(Stage::Credentials, cannot)?,
        }
    }
    if let Some(mask) = user.umask() {
        rustix::process::umask(Mode::from_raw_mode(mask & 0o777));
    }
    rustix::thread::set_keep_capabilities(true).at(Stage::Credentials, cannot)?;
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    rustix::thread::set_thread_groups(&groups).at(Stage::Credentials, || {
        format!("cannot set the additional groups {:?}", user.additional_gids())
    })?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    rustix::thread::set_thread_res_gid(gid, gid, gid).at(Stage::Credentials, || {
        format!("cannot become the group {}", user.gid())
    })?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).at(Stage::Credentials, || {
        format!("cannot become the user {}", user.uid())
    })?;
    rustix::thread::set_keep_capabilities(false).at(Stage::Credentials, cannot)?;
    capabilities
        .narrow(kept)
        .at(Stage::Credentials, || "cannot set the capabilities")
}

/// All capabilities that rustix has a name for.
trait AllKnown {
    fn all_known() -> Self;
}

impl AllKnown for CapabilitySet {
    fn all_known() -> Self {
        IN_ORDER.iter().map(|name| bit(*name)).collect()
    }
}

fn bit(capability: Capability) -> CapabilitySet {
    IN_ORDER
        .iter()
        .position(|known| *known == capability)
        .map_or(CapabilitySet::empty(), |number| {
            CapabilitySet::from_bits_retain(1 << number)
        })
}

/// Capabilities by their number, include/uapi/linux/capability.h.
const IN_ORDER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_agree_with_the_kernels_names() {
        for (name, set) in [
            (Capability::Chown, CapabilitySet::CHOWN),
            (Capability::NetRaw, CapabilitySet::NET_RAW),
            (Capability::SysAdmin, CapabilitySet::SYS_ADMIN),
            (Capability::Mknod, CapabilitySet::MKNOD),
            (Capability::AuditRead, CapabilitySet::AUDIT_READ),
            (Capability::CheckpointRestore, CapabilitySet::CHECKPOINT_RESTORE),
        ] {
            assert_eq!(bit(name), set, "{name}");
        }
    }

    #[test]
    fn sets_are_taken_as_listed_and_absent_ones_are_empty() {
        let listed: LinuxCapabilities =
            serde_json::from_str(r#"{"bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL"]}"#)
                .unwrap();
        let sets = Capabilities::of(Some(&listed));
        assert_eq!(sets.bounding, CapabilitySet::KILL | CapabilitySet::CHOWN);
        assert_eq!(sets.effective, CapabilitySet::KILL);
        assert!(sets.ambient.is_empty() && sets.permitted.is_empty());
        assert!(Capabilities::of(None).bounding.is_empty());
    }
}
