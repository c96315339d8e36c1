//! The machine: memory slots, interrupts, saved state.
#![expect(unsafe_code, reason = "host addresses become guest memory")]

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, PoisonError};

use caisson_arch_x86_64::{VmState, X86_64};
use caisson_hal::{Accel, Access, FastPaths, GuestAddress, Interrupts, Line, Msi, Region, Result, Vm};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_msi, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::fast_paths::Fast;
use crate::{failed, kernel_said, refused, x86_64};

/// A virtual machine of the kernel.
pub struct KvmVm {
    machine: Arc<Machine>,
    fast: Option<Arc<Fast>>,
}

/// The kernel's VM and the memory that it uses. Shared with the vCPUs, because the kernel's VM lives as long as the last
/// descriptor of either, and the memory must live as long as that.
pub(crate) struct Machine {
    // Dropped before the memory.
    pub(crate) fd: VmFd,
    slots: Mutex<Slots>,
}

struct Slots {
    mapped: BTreeMap<u64, Slot>,
    /// How many the kernel has.
    most: u32,
}

struct Slot {
    number: u32,
    region: Arc<Region>,
    access: Access,
    tracked: bool,
}

impl KvmVm {
    pub(crate) fn new(machine: Arc<Machine>, accel: Accel) -> Self {
        let fast = (accel.doorbell && accel.irq_event).then(|| Arc::new(Fast::new(machine.clone())));
        Self { machine, fast }
    }
}

impl Machine {
    pub(crate) fn new(fd: VmFd, slots: usize) -> Self {
        Self {
            fd,
            slots: Mutex::new(Slots {
                mapped: BTreeMap::new(),
                most: u32::try_from(slots).unwrap_or(u32::MAX),
            }),
        }
    }

    fn tell(&self, at: u64, slot: &Slot, size: u64) -> std::result::Result<(), kvm_ioctls::Error> {
        let mut flags = 0;
        if slot.access == Access::ReadOnly {
            flags |= KVM_MEM_READONLY;
        }
        if slot.tracked {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: slot.region.as_ptr().addr() as u64,
        };
        // SAFETY: the slot holds the region, and is dropped only after the kernel was told a size of zero or after the
        // VM's last descriptor was closed; so the range is mapped as long as the kernel uses it.
        unsafe { self.fd.set_user_memory_region(region) }
    }
}

impl Vm for KvmVm {
    type Arch = X86_64;

    fn map(&self, at: GuestAddress, region: Arc<Region>, access: Access) -> Result<()> {
        const OP: &str = "map guest memory";
        let size = region.size() as u64;
        let end = at.0.checked_add(size);
        let aligned = at.0.is_multiple_of(PAGE) && size.is_multiple_of(PAGE);
        let Some(end) = end.filter(|_| size != 0 && aligned) else {
            return Err(refused(
                OP,
                ErrorKind::InvalidInput,
                "address and size must be whole pages",
            ));
        };
        let mut slots = self.machine.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let before = slots.mapped.range(..end).next_back();
        if before.is_some_and(|(start, slot)| start.saturating_add(slot.region.size() as u64) > at.0) {
            return Err(refused(
                OP,
                ErrorKind::AlreadyExists,
                "the range overlaps an earlier one",
            ));
        }
        let used = |number: &u32| slots.mapped.values().any(|slot| slot.number == *number);
        let Some(number) = (0..slots.most).find(|number| !used(number)) else {
            return Err(refused(
                OP,
                ErrorKind::QuotaExceeded,
                "all memory slots are in use",
            ));
        };
        let slot = Slot {
            number,
            region,
            access,
            tracked: false,
        };
        self.machine.tell(at.0, &slot, size).map_err(kernel_said(OP))?;
        slots.mapped.insert(at.0, slot);
        Ok(())
    }

    fn unmap(&self, at: GuestAddress) -> Result<()> {
        const OP: &str = "unmap guest memory";
        let mut slots = self.machine.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.mapped.get_mut(&at.0).ok_or_else(|| not_mapped(OP))?;
        self.machine.tell(at.0, slot, 0).map_err(kernel_said(OP))?;
        slots.mapped.remove(&at.0);
        Ok(())
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        self.machine.clone()
    }

    fn fast_paths(&self) -> Option<Arc<dyn FastPaths>> {
        let fast = self.fast.clone()?;
        Some(fast)
    }

    fn dirty_pages(&self, at: GuestAddress) -> Result<Vec<u64>> {
        const OP: &str = "read the dirty log";
        let mut slots = self.machine.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.mapped.get_mut(&at.0).ok_or_else(|| not_mapped(OP))?;
        let size = slot.region.size();
        if slot.tracked {
            return self
                .machine
                .fd
                .get_dirty_log(slot.number, size)
                .map_err(kernel_said(OP));
        }
        slot.tracked = true;
        if let Err(errno) = self.machine.tell(at.0, slot, size as u64) {
            slot.tracked = false;
            return Err(kernel_said(OP)(errno));
        }
        Ok(all_pages(size as u64 / PAGE))
    }

    fn save(&self) -> Result<VmState> {
        x86_64::save_vm(&self.machine.fd)
    }

    fn restore(&self, state: &VmState) -> Result<()> {
        x86_64::restore_vm(&self.machine.fd, state)
    }
}

impl Interrupts for Machine {
    fn set_line(&self, line: Line, high: bool) -> Result<()> {
        const OP: &str = "drive an interrupt line";
        if line.0 >= x86_64::LINES {
            return Err(refused(
                OP,
                ErrorKind::InvalidInput,
                "the controller has no such line",
            ));
        }
        self.fd.set_irq_line(line.0, high).map_err(kernel_said(OP))
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        const OP: &str = "send a message-signalled interrupt";
        let (low, high) = x86_64::msi_address(msi.address).ok_or_else(|| {
            refused(
                OP,
                ErrorKind::InvalidInput,
                "the address is no interrupt doorbell",
            )
        })?;
        let msi = kvm_msi {
            address_lo: low,
            address_hi: high,
            data: msi.data,
            ..Default::default()
        };
        // A count of zero means that the guest has masked it; that is the guest's affair.
        self.fd.signal_msi(msi).map(drop).map_err(kernel_said(OP))
    }
}

impl fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVm").finish_non_exhaustive()
    }
}

fn not_mapped(op: &'static str) -> caisson_hal::Failed {
    failed(op, io::Error::new(ErrorKind::NotFound, "nothing is mapped there"))
}

/// A bitmap of `pages` ones.
fn all_pages(pages: u64) -> Vec<u64> {
    let whole = usize::try_from(pages / 64).unwrap_or(0);
    let mut bits = vec![u64::MAX; whole];
    if !pages.is_multiple_of(64) {
        bits.push((1 << (pages % 64)) - 1);
    }
    bits
}

/// Pages of memory slots.
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_has_a_bit_for_each_page_and_no_more() {
        for (pages, want) in [
            (1, vec![1]),
            (63, vec![u64::MAX >> 1]),
            (64, vec![u64::MAX]),
            (65, vec![u64::MAX, 1]),
        ] {
            assert_eq!(all_pages(pages), want, "{pages} pages");
        }
    }
}
