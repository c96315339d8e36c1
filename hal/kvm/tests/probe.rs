//! The probe on this machine's own `/dev/kvm`.

use std::time::Instant;

use caisson_hal::{Hypervisor as _, PROBE_LIMIT};
use caisson_hal_kvm::Kvm;

#[test]
fn the_probe_answers_in_time() {
    let Ok(kvm) = Kvm::open() else {
        println!("skipped: no usable /dev/kvm");
        return;
    };
    // The best of a few, and not the limit itself: the machine that tests is busy with other tests, and the kernel with
    // ending the machine that was probed before.
    let mut best = None;
    for _ in 0..5 {
        let started = Instant::now();
        let answer = kvm.probe();
        let took = started.elapsed();
        if let Err(error) = &answer {
            assert!(error.to_string().contains("not hardware-accelerated"), "{error}");
        }
        println!("{took:?} {answer:?}");
        best = best.min(Some(took)).or(Some(took));
    }
    assert!(best < Some(5 * PROBE_LIMIT), "best of five: {best:?}");
}
