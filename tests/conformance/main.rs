//! Conformance of the hypervisor backend: tiny hand-assembled guests, the same for every backend of an architecture.
//!
//! A machine without a hypervisor skips them and says so; `CAISSON_NEED=kvm` makes that a failure. A hypervisor that
//! interprets its guests runs them all the same; `CAISSON_NEED=kvm,hardware` makes that a failure too.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says why it does not run"
)]

mod access;
mod bench;
mod entry;
mod fast_paths;
mod interrupts;
mod kicks;
mod memory;
mod state;

use caisson_hal_native::Native;

/// One test for each case, on the backend of this build.
macro_rules! cases {
    ($($module:ident { $($case:ident)* })*) => {
        $($(
            #[test]
            fn $case() {
                bench::check::<Native>(stringify!($case), $module::$case::<Native>);
            }
        )*)*
    };
}

cases! {
    entry {
        a_vcpu_starts_in_real_mode
        a_vcpu_starts_in_64_bit_mode_with_all_registers
        a_triple_fault_resets_the_machine
        a_fetch_from_nowhere_crashes_with_a_report
        the_device_sides_verdict_ends_the_run
    }
    access {
        ports_are_written_in_every_width
        ports_are_read_in_every_width
        string_output_is_one_access_an_item
        string_input_fills_memory
        loads_have_every_width
        stores_have_every_width
        misaligned_and_page_crossing_loads_are_whole
        misaligned_and_page_crossing_stores_are_whole
        an_unclaimed_address_reads_as_ones
    }
    memory {
        read_only_memory_is_read_and_its_stores_exit
        unmapped_memory_exits
        mappings_that_make_no_sense_are_refused
        written_pages_are_in_the_dirty_log
    }
    interrupts {
        an_msi_wakes_a_halted_vcpu
        a_line_wakes_a_halted_vcpu
        the_local_timer_wakes_a_halted_vcpu
        a_second_cpu_starts_by_init_and_sipi
        interrupts_to_nowhere_are_refused
    }
    kicks {
        a_kick_before_the_run_ends_it
        kicks_coalesce_and_count_once
        a_kick_before_the_seat_is_bound_counts
        of_ten_thousand_kicks_none_is_lost
        a_kick_during_an_access_leaves_it_complete
        a_kick_ends_a_halt
    }
    state {
        a_guest_goes_on_in_a_fresh_machine
        an_unknown_version_is_refused
    }
    fast_paths {
        a_store_rings_its_doorbell_and_nothing_else
        an_event_becomes_an_interrupt_and_can_be_redirected
    }
}
