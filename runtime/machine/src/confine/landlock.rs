//! The second fence around files, for kernels that have it: nothing but what is below the shared directory.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

/// The newest interface whose rights are known here.
const KNOWN: ABI = ABI::V6;

/// Fences this thread and those it starts. Says whether the kernel does it.
///
/// Signals are not scoped: a QEMU child is outside the fence and must be ended.
pub(super) fn fence(share: Option<BorrowedFd<'_>>) -> Result<bool, RulesetError> {
    // Without the right to refer (Linux 5.19), a fence would forbid every rename between directories.
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::SoftRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    if let Some(share) = share {
        ruleset = ruleset.add_rule(PathBeneath::new(share, AccessFs::from_all(KNOWN)))?;
    }
    let status = ruleset.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
