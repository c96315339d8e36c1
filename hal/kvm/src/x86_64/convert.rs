//! Each type there and back: the architecture's own, and KVM's.

use caisson_arch_x86_64::state::{Activity, Events, Exception, Pic, PitChannel};
use caisson_arch_x86_64::{GeneralRegs, Segment, SpecialRegs, Table};
use kvm_bindings as kvm;

/// Copies fields of the same name from one structure to another.
macro_rules! same_fields {
    ($from:expr => $to:ty { $($field:ident),* $(,)? }) => {{
        type To = $to;
        To { $($field: $from.$field),* }
    }};
}

pub(super) fn general_from(regs: &kvm::kvm_regs) -> GeneralRegs {
    same_fields!(regs => GeneralRegs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    })
}

pub(super) fn general_to(regs: &GeneralRegs) -> kvm::kvm_regs {
    same_fields!(regs => kvm::kvm_regs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    })
}

pub(super) fn special_from(regs: &kvm::kvm_sregs) -> SpecialRegs {
    SpecialRegs {
        cs: segment_from(&regs.cs),
        ds: segment_from(&regs.ds),
        es: segment_from(&regs.es),
        fs: segment_from(&regs.fs),
        gs: segment_from(&regs.gs),
        ss: segment_from(&regs.ss),
        tr: segment_from(&regs.tr),
        ldt: segment_from(&regs.ldt),
        gdt: same_fields!(regs.gdt => Table { base, limit }),
        idt: same_fields!(regs.idt => Table { base, limit }),
        cr0: regs.cr0,
        cr2: regs.cr2,
        cr3: regs.cr3,
        cr4: regs.cr4,
        cr8: regs.cr8,
        efer: regs.efer,
    }
}

/// What is not in [`SpecialRegs`] stays as in `old`.
pub(super) fn special_to(regs: &SpecialRegs, old: kvm::kvm_sregs) -> kvm::kvm_sregs {
    let table = |table: &Table| kvm::kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    };
    kvm::kvm_sregs {
        cs: segment_to(&regs.cs),
        ds: segment_to(&regs.ds),
        es: segment_to(&regs.es),
        fs: segment_to(&regs.fs),
        gs: segment_to(&regs.gs),
        ss: segment_to(&regs.ss),
        tr: segment_to(&regs.tr),
        ldt: segment_to(&regs.ldt),
        gdt: table(&regs.gdt),
        idt: table(&regs.idt),
        cr0: regs.cr0,
        cr2: regs.cr2,
        cr3: regs.cr3,
        cr4: regs.cr4,
        cr8: regs.cr8,
        efer: regs.efer,
        ..old
    }
}

pub(super) fn segment_from(segment: &kvm::kvm_segment) -> Segment {
    let fields = [
        (segment.type_ & 0xf, 0),
        (segment.s & 1, 4),
        (segment.dpl & 3, 5),
        (segment.present & 1, 7),
        (segment.avl & 1, 12),
        (segment.l & 1, 13),
        (segment.db & 1, 14),
        (segment.g & 1, 15),
        (segment.unusable & 1, 16),
    ];
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        access: fields
            .iter()
            .fold(0, |word, (field, at)| word | u32::from(*field) << at),
    }
}

pub(super) fn segment_to(segment: &Segment) -> kvm::kvm_segment {
    let field = |at: u32, mask: u8| segment.access.wrapping_shr(at).to_le_bytes()[0] & mask;
    kvm::kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: field(0, 0xf),
        s: field(4, 1),
        dpl: field(5, 3),
        present: field(7, 1),
        avl: field(12, 1),
        l: field(13, 1),
        db: field(14, 1),
        g: field(15, 1),
        unusable: field(16, 1),
        padding: 0,
    }
}

pub(super) fn apic_from(apic: &kvm::kvm_lapic_state) -> Vec<u32> {
    let bytes: Vec<u8> = apic.regs.iter().map(|byte| byte.to_ne_bytes()[0]).collect();
    let (registers, _) = bytes.as_chunks::<16>();
    registers
        .iter()
        .filter_map(|register| register.first_chunk::<4>())
        .map(|value| u32::from_le_bytes(*value))
        .collect()
}

pub(super) fn apic_to(registers: &[u32]) -> kvm::kvm_lapic_state {
    let mut apic = kvm::kvm_lapic_state::default();
    let (to, _) = apic.regs.as_chunks_mut::<16>();
    for (to, from) in to.iter_mut().zip(registers) {
        for (to, from) in to.iter_mut().zip(from.to_le_bytes()) {
            *to = i8::from_ne_bytes([from]);
        }
    }
    apic
}

pub(super) fn events_from(events: &kvm::kvm_vcpu_events) -> Events {
    let exception = &events.exception;
    Events {
        exception: (exception.injected | exception.pending != 0).then(|| Exception {
            vector: exception.nr,
            error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: (events.exception_has_payload != 0).then_some(events.exception_payload),
        }),
        exception_injected: exception.injected != 0,
        interrupt: (events.interrupt.injected != 0)
            .then_some((events.interrupt.nr, events.interrupt.soft != 0)),
        shadow: events.interrupt.shadow,
        nmi_injected: events.nmi.injected != 0,
        nmi_pending: events.nmi.pending,
        nmi_masked: events.nmi.masked != 0,
        sipi_vector: events.sipi_vector,
        smm: events.smi.smm & 1
            | (events.smi.pending & 1) << 1
            | (events.smi.smm_inside_nmi & 1) << 2
            | (events.smi.latched_init & 1) << 3,
    }
}

pub(super) fn events_to(from: &Events) -> kvm::kvm_vcpu_events {
    let mut events = kvm::kvm_vcpu_events {
        // The payload is not among them: KVM applies it to the registers itself unless asked to keep it apart.
        flags: kvm::KVM_VCPUEVENT_VALID_NMI_PENDING
            | kvm::KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | kvm::KVM_VCPUEVENT_VALID_SHADOW,
        sipi_vector: from.sipi_vector,
        ..Default::default()
    };
    if let Some(exception) = &from.exception {
        // Without the payload extension KVM takes a raised exception as one begun.
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error_code.is_some());
        events.exception.error_code = exception.error_code.unwrap_or(0);
    }
    if let Some((vector, software)) = from.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = u8::from(software);
    }
    events.interrupt.shadow = from.shadow;
    events.nmi.injected = u8::from(from.nmi_injected);
    events.nmi.pending = from.nmi_pending;
    events.nmi.masked = u8::from(from.nmi_masked);
    if from.smm != 0 {
        events.flags |= kvm::KVM_VCPUEVENT_VALID_SMM;
        events.smi.smm = from.smm & 1;
        events.smi.pending = from.smm >> 1 & 1;
        events.smi.smm_inside_nmi = from.smm >> 2 & 1;
        events.smi.latched_init = from.smm >> 3 & 1;
    }
    events
}

pub(super) fn activity_from(state: u32) -> Option<Activity> {
    Some(match state {
        kvm::KVM_MP_STATE_RUNNABLE => Activity::Runs,
        kvm::KVM_MP_STATE_HALTED => Activity::Halted,
        kvm::KVM_MP_STATE_UNINITIALIZED => Activity::AwaitsInit,
        kvm::KVM_MP_STATE_INIT_RECEIVED => Activity::AwaitsSipi,
        kvm::KVM_MP_STATE_SIPI_RECEIVED => Activity::GotSipi,
        _ => return None,
    })
}

pub(super) fn activity_to(activity: Activity) -> u32 {
    match activity {
        Activity::Runs => kvm::KVM_MP_STATE_RUNNABLE,
        Activity::Halted => kvm::KVM_MP_STATE_HALTED,
        Activity::AwaitsInit => kvm::KVM_MP_STATE_UNINITIALIZED,
        Activity::AwaitsSipi => kvm::KVM_MP_STATE_INIT_RECEIVED,
        Activity::GotSipi => kvm::KVM_MP_STATE_SIPI_RECEIVED,
    }
}

pub(super) fn pic_from(pic: &kvm::kvm_pic_state) -> Pic {
    same_fields!(pic => Pic {
        last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state, auto_eoi,
        rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask,
    })
}

pub(super) fn pic_to(pic: &Pic) -> kvm::kvm_pic_state {
    same_fields!(pic => kvm::kvm_pic_state {
        last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state, auto_eoi,
        rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask,
    })
}

pub(super) fn channel_from(channel: &kvm::kvm_pit_channel_state) -> PitChannel {
    same_fields!(channel => PitChannel {
        count, latched_count, count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode,
        bcd, gate,
    })
}

pub(super) fn channel_to(channel: &PitChannel) -> kvm::kvm_pit_channel_state {
    kvm::kvm_pit_channel_state {
        count: channel.count,
        latched_count: channel.latched_count,
        count_latched: channel.count_latched,
        status_latched: channel.status_latched,
        status: channel.status,
        read_state: channel.read_state,
        write_state: channel.write_state,
        write_latch: channel.write_latch,
        rw_mode: channel.rw_mode,
        mode: channel.mode,
        bcd: channel.bcd,
        gate: channel.gate,
        // KVM starts a counter over when its state is set.
        count_load_time: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_survives_the_way_there_and_back() {
        for access in [0xa09b, 0xc093, 0x8b, 0x1_0000] {
            let segment = Segment {
                selector: 8,
                base: 0x1234,
                limit: 0xffff,
                access,
            };
            assert_eq!(segment_from(&segment_to(&segment)), segment, "{access:#x}");
        }
    }

    #[test]
    fn an_apic_page_survives_the_way_there_and_back() {
        let registers: Vec<u32> = (0..64).map(|register| register * 0x0103_05ff).collect();
        assert_eq!(apic_from(&apic_to(&registers)), registers);
    }

    #[test]
    fn pending_events_survive_the_way_there_and_back() {
        let events = Events {
            exception: Some(Exception {
                vector: 14,
                error_code: Some(2),
                payload: None,
            }),
            exception_injected: true,
            interrupt: Some((0x30, false)),
            shadow: 1,
            nmi_pending: 1,
            sipi_vector: 8,
            smm: 0b1000,
            ..Default::default()
        };
        assert_eq!(events_from(&events_to(&events)), events);
    }
}
