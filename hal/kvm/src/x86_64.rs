//! The x86_64 guest on KVM: types converted, and KVM's order of calls. Nothing is decided here.
#![expect(unsafe_code, reason = "unions of the kernel's interface")]

mod convert;

use std::io::{self, ErrorKind};

use caisson_arch_x86_64::cpuid::{Leaf, Place};
use caisson_arch_x86_64::state::{Ioapic, Pit, VCPU_VERSION, VM_VERSION};
use caisson_arch_x86_64::{BootRegs, IrqLayout, VcpuState, VmState, X86_64};
use caisson_hal::{GuestAddress, Msi, Result, VmSpec};
use kvm_bindings as kvm;
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use self::convert::{
    activity_from, activity_to, apic_from, apic_to, channel_from, channel_to, events_from, events_to,
    general_from, general_to, pic_from, pic_to, special_from, special_to,
};
use crate::{failed, kernel_said, refused};

/// APIC ids of 8 bits, of which 0xff addresses all.
pub(crate) const MOST_VCPUS: usize = 254;
/// Lines of the kernel's IOAPIC.
pub(crate) const LINES: u32 = 24;
/// Inputs of the kernel's routing table (`KVM_MAX_IRQ_ROUTES`).
pub(crate) const MOST_ROUTES: u32 = 4096;
/// What a VM needs of KVM here, with the name to tell.
pub(crate) const NEEDED: [(Cap, &str); 16] = [
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::Pit2, "PIT2"),
    (Cap::PitState2, "PIT_STATE2"),
    (Cap::MpState, "MP_STATE"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRS"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
    (Cap::SignalMsi, "SIGNAL_MSI"),
    (Cap::ReadonlyMem, "READONLY_MEM"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
];

/// Three pages for real mode on old Intel processors and one for its page table, below the top of 32-bit addresses
/// where a PC has its firmware.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;
/// IA32_TSC_DEADLINE: written last, because it compares with the time-stamp counter.
const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MTRR_DEF_TYPE (Intel SDM volume 3, section "Memory Type Range Registers").
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Memory is write-back where no range says otherwise, as firmware leaves it: enabled, type 6.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Leaf 1, ECX: the APIC timer can run to a time-stamp.
const TSC_DEADLINE_TIMER: u32 = 1 << 24;
/// Where messages go: the local APICs' window (Intel SDM volume 3, section "Message Signalled Interrupts").
const MSI_BASE: u64 = 0xfee0_0000;
const MSI_SPAN: u64 = 0x0010_0000;

/// What the host's KVM offers a vCPU, read once for a machine.
#[derive(Debug)]
pub(crate) struct Processor {
    leaves: Vec<Leaf>,
    msrs: Vec<u32>,
}

impl Processor {
    pub(crate) fn read(kvm: &kvm_ioctls::Kvm) -> Result<Self> {
        const OP: &str = "ask KVM what its vCPUs can do";
        let cpuid = kvm
            .get_supported_cpuid(kvm::KVM_MAX_CPUID_ENTRIES)
            .map_err(kernel_said(OP))?;
        let mut leaves: Vec<Leaf> = cpuid.as_slice().iter().map(leaf).collect();
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
                leaf.ecx |= TSC_DEADLINE_TIMER;
            }
        }
        let list = kvm.get_msr_index_list().map_err(kernel_said(OP))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.sort_by_key(|msr| *msr == TSC_DEADLINE);
        Ok(Self { leaves, msrs })
    }
}

pub(crate) fn set_up_vm(fd: &VmFd, spec: &VmSpec<X86_64>) -> Result<()> {
    const OP: &str = "create the interrupt controllers";
    if spec.irq != IrqLayout::default() {
        let why = "KVM's interrupt controllers are where a PC has them and nowhere else";
        return Err(refused(OP, ErrorKind::InvalidInput, why));
    }
    fd.set_identity_map_address(IDENTITY_MAP)
        .map_err(kernel_said("reserve the real-mode page table"))?;
    fd.set_tss_address(TSS)
        .map_err(kernel_said("reserve the real-mode task state"))?;
    fd.create_irq_chip().map_err(kernel_said(OP))?;
    let pit = kvm::kvm_pit_config {
        // The kernel answers port 0x61, which guests read to calibrate their clock.
        flags: kvm::KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    fd.create_pit2(pit).map_err(kernel_said("create the 8254 timer"))
}

pub(crate) fn set_up_vcpu(fd: &VcpuFd, processor: &Processor, spec: &VmSpec<X86_64>, id: u32) -> Result<()> {
    const OP: &str = "set what a vCPU can do";
    let place = Place {
        id,
        count: spec.vcpus,
        phys_bits: spec.phys_bits,
    };
    let leaves = spec.cpu.leaves(&processor.leaves, place);
    let entries: Vec<_> = leaves.iter().map(cpuid_entry).collect();
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|_| refused(OP, ErrorKind::InvalidData, "more CPUID leaves than KVM takes"))?;
    fd.set_cpuid2(&cpuid).map_err(kernel_said(OP))?;
    // Only a matter of speed, and not every KVM has the register.
    let _ = write_msrs(fd, &[(MTRR_DEF_TYPE, MTRR_WRITE_BACK)]);
    Ok(())
}

pub(crate) fn set_boot_regs(fd: &VcpuFd, boot: &BootRegs) -> Result<()> {
    const OP: &str = "set a vCPU's entry state";
    let old = fd.get_sregs().map_err(kernel_said(OP))?;
    fd.set_sregs(&special_to(&boot.special, old))
        .map_err(kernel_said(OP))?;
    fd.set_regs(&general_to(&boot.general)).map_err(kernel_said(OP))
}

pub(crate) fn save_vcpu(fd: &VcpuFd, processor: &Processor) -> Result<VcpuState> {
    const OP: &str = "save a vCPU";
    let said = kernel_said(OP);
    // The activity first: asking for it makes KVM act on an INIT or start-up interrupt that waits.
    let activity = activity_from(fd.get_mp_state().map_err(&said)?.mp_state).ok_or_else(|| {
        refused(
            OP,
            ErrorKind::InvalidData,
            "the vCPU is in a state that no PC has",
        )
    })?;
    let special = fd.get_sregs().map_err(&said)?;
    let xcrs = fd.get_xcrs().map_err(&said)?;
    let debug = fd.get_debug_regs().map_err(&said)?;
    Ok(VcpuState {
        version: VCPU_VERSION,
        general: general_from(&fd.get_regs().map_err(&said)?),
        special: special_from(&special),
        xsave: fd
            .get_xsave()
            .map_err(&said)?
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect(),
        xcr0: xcrs
            .xcrs
            .iter()
            .take(usize::try_from(xcrs.nr_xcrs).unwrap_or(0))
            .find(|xcr| xcr.xcr == 0)
            .map(|xcr| xcr.value),
        msrs: read_msrs(fd, &processor.msrs)?,
        local_apic: apic_from(&fd.get_lapic().map_err(&said)?),
        apic_base: special.apic_base,
        events: events_from(&fd.get_vcpu_events().map_err(&said)?),
        activity,
        breakpoints: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
    })
}

pub(crate) fn restore_vcpu(fd: &VcpuFd, state: &VcpuState) -> Result<()> {
    const OP: &str = "restore a vCPU";
    let said = kernel_said(OP);
    check_version(OP, state.version, VCPU_VERSION)?;
    if state.tsc_khz != 0 && fd.get_tsc_khz().is_ok_and(|here| here != state.tsc_khz) {
        // Without scaling the guest's clock would be wrong, so a refusal is an error.
        fd.set_tsc_khz(state.tsc_khz).map_err(&said)?;
    }
    let mut special = special_to(&state.special, Default::default());
    special.apic_base = state.apic_base;
    fd.set_sregs(&special).map_err(&said)?;
    if let Some(value) = state.xcr0 {
        let mut xcrs = kvm::kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        if let Some(first) = xcrs.xcrs.first_mut() {
            first.value = value;
        }
        fd.set_xcrs(&xcrs).map_err(&said)?;
    }
    let mut xsave = kvm::kvm_xsave::default();
    let (words, rest) = state.xsave.as_chunks::<4>();
    if words.len() != xsave.region.len() || !rest.is_empty() {
        return Err(refused(
            OP,
            ErrorKind::InvalidData,
            "the XSAVE area has another size",
        ));
    }
    for (to, from) in xsave.region.iter_mut().zip(words) {
        *to = u32::from_le_bytes(*from);
    }
    // SAFETY: the kernel reads the 4096 bytes of the structure, because no vCPU has tile state (it is not in its
    // CPUID, and needs a permission that this process does not ask for).
    unsafe { fd.set_xsave(&xsave) }.map_err(&said)?;
    fd.set_debug_regs(&kvm::kvm_debugregs {
        db: state.breakpoints,
        dr6: state.dr6,
        dr7: state.dr7,
        ..Default::default()
    })
    .map_err(&said)?;
    fd.set_regs(&general_to(&state.general)).map_err(&said)?;
    // Before the MSRs, because its mode decides whether a timer deadline is accepted.
    fd.set_lapic(&apic_to(&state.local_apic)).map_err(&said)?;
    write_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&events_to(&state.events)).map_err(&said)?;
    fd.set_mp_state(kvm::kvm_mp_state {
        mp_state: activity_to(state.activity),
    })
    .map_err(said)
}

pub(crate) fn save_vm(fd: &VmFd) -> Result<VmState> {
    const OP: &str = "save the interrupt controllers";
    let said = kernel_said(OP);
    let chip = |chip_id| {
        let mut chip = kvm::kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        fd.get_irqchip(&mut chip).map(|()| chip).map_err(&said)
    };
    // SAFETY: the chip's id says which member the kernel filled in.
    let first = unsafe { chip(kvm::KVM_IRQCHIP_PIC_MASTER)?.chip.pic };
    // SAFETY: as above.
    let second = unsafe { chip(kvm::KVM_IRQCHIP_PIC_SLAVE)?.chip.pic };
    // SAFETY: as above.
    let ioapic = unsafe { chip(kvm::KVM_IRQCHIP_IOAPIC)?.chip.ioapic };
    let pit = fd.get_pit2().map_err(kernel_said("save the 8254 timer"))?;
    Ok(VmState {
        version: VM_VERSION,
        pic_first: pic_from(&first),
        pic_second: pic_from(&second),
        ioapic: Ioapic {
            base: ioapic.base_address,
            select: ioapic.ioregsel,
            id: ioapic.id,
            irr: ioapic.irr,
            // SAFETY: both members are the same 64 bits.
            redirection: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
        },
        pit: Pit {
            channels: pit.channels.map(|channel| channel_from(&channel)),
            legacy_disabled: pit.flags & kvm::KVM_PIT_FLAGS_HPET_LEGACY != 0,
        },
        clock: fd
            .get_clock()
            .map_err(kernel_said("save the guest's clock"))?
            .clock,
    })
}

pub(crate) fn restore_vm(fd: &VmFd, state: &VmState) -> Result<()> {
    const OP: &str = "restore the interrupt controllers";
    check_version(OP, state.version, VM_VERSION)?;
    let ioapic = kvm::kvm_ioapic_state {
        base_address: state.ioapic.base,
        ioregsel: state.ioapic.select,
        id: state.ioapic.id,
        irr: state.ioapic.irr,
        pad: 0,
        redirtbl: state
            .ioapic
            .redirection
            .map(|bits| kvm::kvm_ioapic_state__bindgen_ty_1 { bits }),
    };
    for (chip_id, chip) in [
        (
            kvm::KVM_IRQCHIP_PIC_MASTER,
            kvm::kvm_irqchip__bindgen_ty_1 {
                pic: pic_to(&state.pic_first),
            },
        ),
        (
            kvm::KVM_IRQCHIP_PIC_SLAVE,
            kvm::kvm_irqchip__bindgen_ty_1 {
                pic: pic_to(&state.pic_second),
            },
        ),
        (kvm::KVM_IRQCHIP_IOAPIC, kvm::kvm_irqchip__bindgen_ty_1 { ioapic }),
    ] {
        let chip = kvm::kvm_irqchip {
            chip_id,
            pad: 0,
            chip,
        };
        fd.set_irqchip(&chip).map_err(kernel_said(OP))?;
    }
    let pit = kvm::kvm_pit_state2 {
        channels: state.pit.channels.map(|channel| channel_to(&channel)),
        flags: u32::from(state.pit.legacy_disabled) * kvm::KVM_PIT_FLAGS_HPET_LEGACY,
        ..Default::default()
    };
    fd.set_pit2(&pit).map_err(kernel_said("restore the 8254 timer"))?;
    let clock = kvm::kvm_clock_data {
        clock: state.clock,
        ..Default::default()
    };
    fd.set_clock(&clock)
        .map_err(kernel_said("restore the guest's clock"))
}

/// The two halves of a message's address, if it is one of the local APICs'.
pub(crate) fn msi_address(at: GuestAddress) -> Option<(u32, u32)> {
    let offset = at.0.checked_sub(MSI_BASE)?;
    let low = u32::try_from(at.0).ok()?;
    (offset < MSI_SPAN).then_some((low, 0))
}

/// The routes that the kernel starts with: a line is the pin of the same number of the IOAPIC and, below 16, of the 8259s.
pub(crate) fn wired_routes() -> Vec<kvm::kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| kvm::kvm_irq_routing_entry {
        gsi,
        type_: kvm::KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm::kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm::kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let ioapic = (0..LINES).map(|line| pin(line, kvm::KVM_IRQCHIP_IOAPIC, line));
    let first = (0..8).map(|line| pin(line, kvm::KVM_IRQCHIP_PIC_MASTER, line));
    let second = (8..16).map(|line| pin(line, kvm::KVM_IRQCHIP_PIC_SLAVE, line - 8));
    ioapic.chain(first).chain(second).collect()
}

/// The route from an input to a message.
pub(crate) fn msi_route(gsi: u32, msi: Msi) -> Option<kvm::kvm_irq_routing_entry> {
    let (address_lo, address_hi) = msi_address(msi.address)?;
    Some(kvm::kvm_irq_routing_entry {
        gsi,
        type_: kvm::KVM_IRQ_ROUTING_MSI,
        u: kvm::kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm::kvm_irq_routing_msi {
                address_lo,
                address_hi,
                data: msi.data,
                ..Default::default()
            },
        },
        ..Default::default()
    })
}

fn check_version(op: &'static str, found: u32, known: u32) -> Result<()> {
    if found == known {
        return Ok(());
    }
    let why = format!("its version is {found}, and this build reads {known}");
    Err(failed(op, io::Error::new(ErrorKind::InvalidData, why)))
}

/// Reads those registers that this vCPU has; the list is of all that KVM knows.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
    const OP: &str = "save a vCPU's model-specific registers";
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| msr_entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|_| refused(OP, ErrorKind::InvalidData, "too many of them"))?;
        let read = fd.get_msrs(&mut msrs).map_err(kernel_said(OP))?;
        values.extend(msrs.as_slice().iter().take(read).map(|msr| (msr.index, msr.data)));
        // KVM stops at the first that it refuses.
        rest = rest.get(read.saturating_add(1)..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes registers. One that KVM refuses must have the value already.
fn write_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<()> {
    const OP: &str = "restore a vCPU's model-specific registers";
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|(index, data)| msr_entry(*index, *data))
            .collect();
        let msrs = Msrs::from_entries(&entries)
            .map_err(|_| refused(OP, ErrorKind::InvalidData, "too many of them"))?;
        let written = fd.set_msrs(&msrs).map_err(kernel_said(OP))?;
        if let Some((index, data)) = rest.get(written)
            && read_msrs(fd, &[*index])? != [(*index, *data)]
        {
            let why = format!("KVM refuses to set {index:#x} to {data:#x}");
            return Err(failed(OP, io::Error::new(ErrorKind::InvalidData, why)));
        }
        rest = rest.get(written.saturating_add(1)..).unwrap_or_default();
    }
    Ok(())
}

fn msr_entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn leaf(entry: &kvm_cpuid_entry2) -> Leaf {
    Leaf {
        function: entry.function,
        index: (entry.flags & kvm::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

fn cpuid_entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index.unwrap_or(0),
        flags: leaf.index.map_or(0, |_| kvm::KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        padding: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_local_apics_window_takes_messages() {
        for (at, want) in [
            (0xfee0_0000, Some((0xfee0_0000, 0))),
            (0xfeef_fffc, Some((0xfeef_fffc, 0))),
            (0xfedf_fffc, None),
            (0xfef0_0000, None),
            (0x1_fee0_0000, None),
        ] {
            assert_eq!(msi_address(GuestAddress(at)), want, "{at:#x}");
        }
    }

    #[test]
    fn the_wired_routes_are_those_the_kernel_starts_with() {
        let routes = wired_routes();
        assert_eq!(routes.iter().filter(|route| route.gsi == 3).count(), 2);
        assert_eq!(routes.iter().filter(|route| route.gsi == 23).count(), 1);
        assert_eq!(routes.len(), 40);
    }
}
