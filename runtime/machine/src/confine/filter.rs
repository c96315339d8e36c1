//! The tables of [`calls`](super::calls) as programs for the kernel.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr as _;
use std::sync::Arc;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::calls::{self, Rule, Thread, When};

/// Every filter, compiled before the process confines itself.
#[derive(Clone, Debug)]
pub(crate) struct Filters {
    base: Arc<BpfProgram>,
    threads: Arc<HashMap<Thread, BpfProgram>>,
}

impl Filters {
    /// Compiles the tables.
    pub(super) fn compile() -> Result<Self, BackendError> {
        let deadly = calls::DEADLY.iter().map(|name| (*name, [].as_slice()));
        let base = program(deadly, SeccompAction::Allow, SeccompAction::KillProcess)?;
        let serving = calls::ROLES.into_iter().map(Thread::Serving);
        let mut threads = HashMap::new();
        for thread in serving.chain([Thread::Control, Thread::Starter]) {
            let rules = calls::allowed(thread).into_iter();
            threads.insert(thread, program(rules, SeccompAction::Trap, SeccompAction::Allow)?);
        }
        Ok(Self {
            base: Arc::new(base),
            threads: Arc::new(threads),
        })
    }

    /// What holds for every thread; those that start later inherit it.
    pub(crate) fn enter_base(&self) -> Result<(), seccompiler::Error> {
        apply_filter(&self.base)
    }

    /// Holds the calling thread to what it may do; no way leads back.
    ///
    /// # Panics
    /// A thread that cannot be confined must not run.
    pub(crate) fn enter(&self, thread: Thread) {
        let applied = self.threads.get(&thread).map(|program| apply_filter(program));
        assert!(
            matches!(applied, Some(Ok(()))),
            "cannot confine a thread for {thread:?}: {applied:?}"
        );
    }
}

/// A program that answers `matching` for what the rules name and `other` for the rest.
fn program(
    rules: impl Iterator<Item = Rule>,
    other: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for (name, conditions) in rules {
        let Some(number) = number(name) else { continue };
        let list = table.entry(number).or_default();
        if conditions.is_empty() {
            unconditional.push(number);
        } else {
            let conditions = conditions.iter().map(condition).collect::<Result<_, _>>()?;
            list.push(SeccompRule::new(conditions)?);
        }
    }
    for number in unconditional {
        table.insert(number, Vec::new()); // no rule: whatever the arguments
    }
    SeccompFilter::new(
        table,
        other,
        matching,
        TargetArch::try_from(std::env::consts::ARCH)?,
    )?
    .try_into()
}

fn condition(when: &When) -> Result<SeccompCondition, BackendError> {
    let (argument, operator, value) = match *when {
        When::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        When::Masked(argument, mask, value) => (argument, SeccompCmpOp::MaskedEq(mask.into()), value),
        When::Ourselves(argument) => (argument, SeccompCmpOp::Eq, std::process::id()),
    };
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
}

/// The number of a call here, if this architecture has it.
fn number(name: &str) -> Option<i64> {
    Some(syscalls::Sysno::from_str(name).ok()?.id().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_call_of_some_architecture() {
        let threads = [Thread::Control, Thread::Starter];
        let names = threads.into_iter().flat_map(calls::allowed).map(|(name, _)| name);
        for name in names.chain(calls::DEADLY.iter().copied()) {
            let here = syscalls::x86_64::Sysno::from_str(name).is_ok();
            assert!(here || syscalls::aarch64::Sysno::from_str(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn no_list_holds_what_is_deadly() {
        for (name, _) in calls::allowed(Thread::Starter) {
            assert!(!calls::DEADLY.contains(&name), "{name}");
        }
    }

    #[test]
    fn filters_compile() {
        let filters = Filters::compile().unwrap();
        assert_eq!(filters.threads.len(), calls::ROLES.len() + 2);
    }
}
