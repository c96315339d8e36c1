//! The kernel's shortcuts, where the backend has them.

use caisson_arch_x86_64::X86_64;
use caisson_hal::os::Event;
use caisson_hal::{Exit, GuestAddress, Hypervisor, Vcpu, Vm};

use crate::bench::{Bench, DEVICE, FINISH, HANDLER, Log, Seen, long};
use crate::interrupts::{ENABLE_APIC, handler, msi};

pub(crate) fn a_store_rings_its_doorbell_and_nothing_else<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x66, 0xc7, 0x07, 0x03, 0x00], // again: mov word [rdi], 3
        &[0x66, 0xc7, 0x07, 0x04, 0x00], // mov word [rdi], 4
        &[0x89, 0x47, 0x10],             // mov [rdi + 16], eax
        FINISH,
        &[0xeb, 0xef], // jmp again
    ];
    let mut bench = Bench::new(hypervisor, 1, code);
    let Some(fast) = bench.vm.fast_paths() else {
        println!("skipped: {} has no fast paths", H::NAME);
        return;
    };
    let (three, any) = (Event::new().unwrap(), Event::new().unwrap());
    let (at, other) = (GuestAddress(DEVICE), GuestAddress(DEVICE + 16));
    fast.bind_doorbell(at, Some(3), &three).unwrap();
    fast.bind_doorbell(other, None, &any).unwrap();
    assert!(fast.bind_doorbell(at, Some(3), &three).is_err(), "bound twice");
    let mut vcpu = bench.bind(&long());
    let mut io = Log::new();
    assert_eq!(vcpu.run(&mut io).unwrap(), Exit::PowerOff);
    assert_eq!(io.seen, [Seen::Store(DEVICE, vec![4, 0])]);
    assert!(three.clear() && any.clear());

    fast.unbind_doorbell(at, Some(3), &three).unwrap();
    fast.unbind_doorbell(other, None, &any).unwrap();
    assert!(
        fast.unbind_doorbell(at, Some(3), &three).is_err(),
        "unbound twice"
    );
    let mut io = Log::new();
    assert_eq!(vcpu.run(&mut io).unwrap(), Exit::PowerOff);
    assert_eq!(io.seen.len(), 3);
    assert!(!three.clear() && !any.clear());
}

pub(crate) fn an_event_becomes_an_interrupt_and_can_be_redirected<H: Hypervisor<Arch = X86_64>>(
    hypervisor: &H,
) {
    let code: &[&[u8]] = &[
        ENABLE_APIC,
        &[0xe6, 0x30], // out 0x30, al: the event is signalled
        &[0xfb, 0xf4], // sti; hlt, and nothing in between
        &[0xfa],       // cli
        &[0xe6, 0x32], // out 0x32, al: redirected and signalled
        &[0xfb, 0xf4], // sti; hlt
        FINISH,
    ];
    let mut bench = Bench::new(hypervisor, 1, code);
    let Some(fast) = bench.vm.fast_paths() else {
        println!("skipped: {} has no fast paths", H::NAME);
        return;
    };
    for (vector, at, letter) in [(0x50, HANDLER, b'a'), (0x51, HANDLER + 0x100, b'b')] {
        bench.gate(vector, at);
        bench.write(usize::from(at), &handler(letter));
    }
    let event = Event::new().unwrap();
    fast.bind_irq(&event, msi(0x50)).unwrap();
    let mut io = Log::hooked(|seen| match seen {
        Seen::Out(0x30, _) => event.signal(),
        Seen::Out(0x32, _) => {
            fast.bind_irq(&event, msi(0x51)).unwrap();
            event.signal();
        }
        _ => {}
    });
    assert_eq!(bench.run(&long(), &mut io), Exit::PowerOff);
    assert_eq!(io.out(0x31), [b"a", b"b"]);
    drop(io);
    fast.unbind_irq(&event).unwrap();
    assert!(fast.unbind_irq(&event).is_err(), "unbound twice");
}
