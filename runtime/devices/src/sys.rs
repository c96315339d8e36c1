//! Giving pages of the guest back to the host.
#![expect(unsafe_code, reason = "madvise on the guest's mapping has no safe form")]

use rustix::mm::{Advice, MapFlags, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::virtio::Memory;

/// Lets go of the host pages that lie wholly in the `len` bytes at `at`; they read as zero afterwards, or, where
/// a private mapping lies over a file, as the file. Says how many bytes that was. What is not memory is skipped.
pub(crate) fn discard(memory: &Memory, at: GuestAddress, len: u64) -> u64 {
    let page = rustix::param::page_size() as u64;
    let (mut at, mut len) = (at, len);
    let mut done = 0;
    while len > 0 {
        let Some(region) = memory.find_region(at) else {
            return done;
        };
        let offset = at.0.saturating_sub(region.start_addr().0);
        let here = len.min(region.len().saturating_sub(offset));
        let first = offset.next_multiple_of(page);
        let last = offset.saturating_add(here) / page * page;
        if let Some(whole) = last.checked_sub(first)
            && whole > 0
            && let Ok(size) = usize::try_from(whole)
            && let Ok(host) = region.get_host_address(MemoryRegionAddress(first))
        {
            let shared = region.flags() & i32::try_from(MapFlags::SHARED.bits()).unwrap_or(0) != 0;
            // In a shared mapping only the removal from the file frees anything.
            let advice = if shared {
                Advice::LinuxRemove
            } else {
                Advice::LinuxDontNeed
            };
            // SAFETY: madvise needs a mapping at [host, host+size) whose contents nobody relies on. `first` and
            // `last` lie in `region`, which `memory` keeps mapped for this call; guest memory is only ever
            // accessed as volatile bytes, so a change of its contents breaks no reference.
            if unsafe { madvise(host.cast(), size, advice) }.is_ok() {
                done = whole.saturating_add(done);
            }
        }
        len = len.saturating_sub(here);
        let Some(next) = at.0.checked_add(here) else {
            return done;
        };
        at = GuestAddress(next);
    }
    done
}
