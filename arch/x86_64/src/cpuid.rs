//! What a guest may know about its processor: from the leaves that a host supports to those a vCPU sees.
//!
//! A pure function of a table. Reading the host's table and loading the guest's is a backend's business.
//! Bit positions are from the Intel SDM, volume 2, instruction CPUID, and the AMD APM, volume 3, appendix E.

/// One CPUID leaf or sub-leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the architecture's own names")]
pub struct Leaf {
    pub function: u32,
    /// The sub-leaf, where the function has any.
    pub index: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// What the guest may know beyond a plain virtual processor. Nothing, unless asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuPolicy {
    /// Offer VMX or SVM, so that the guest can run guests.
    pub nested_virtualization: bool,
    /// Offer the performance counters.
    pub performance_counters: bool,
}

/// Where a vCPU is in its machine: one package, one thread a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its APIC id, which is its index.
    pub id: u32,
    /// vCPUs of the machine.
    pub count: u32,
    /// Guest-physical address bits; zero leaves the host's.
    pub phys_bits: u8,
}

impl CpuPolicy {
    /// The leaves that the vCPU at `place` sees, from those that the host can offer.
    ///
    /// The hypervisor's own leaves at 0x4000_0000 pass unchanged, so that the guest finds its paravirtual clock.
    pub fn leaves(&self, supported: &[Leaf], place: Place) -> Vec<Leaf> {
        let highest = supported
            .iter()
            .find(|leaf| leaf.function == 0)
            .map_or(0, |leaf| leaf.eax);
        let mut leaves: Vec<Leaf> = supported
            .iter()
            .filter(|leaf| self.offers(leaf))
            .map(|leaf| self.adjust(*leaf, place))
            .collect();
        size_extended_state(&mut leaves);
        if highest >= TOPOLOGY {
            leaves.extend(topology(place));
        }
        leaves
    }

    fn offers(&self, leaf: &Leaf) -> bool {
        match leaf.function {
            // SGX, processor trace, AMX tiles, other topologies, memory encryption.
            TOPOLOGY | 0x12 | 0x14 | 0x1d | 0x1e | 0x1f | 0x8000_001f | 0x8000_0026 => false,
            EXTENDED_STATE => leaf
                .index
                .is_none_or(|index| index < 2 || AMX_STATE & bit(index) == 0),
            0x8000_000a => self.nested_virtualization,
            0xa | 0x23 | 0x8000_001b | 0x8000_0022 => self.performance_counters,
            _ => true,
        }
    }

    fn adjust(&self, mut leaf: Leaf, place: Place) -> Leaf {
        let last = place.count.saturating_sub(1);
        match (leaf.function, leaf.index.unwrap_or(0)) {
            (1, _) => {
                leaf.ebx = leaf.ebx & 0x0000_ffff | place.count.min(0xff) << 16 | (place.id & 0xff) << 24;
                leaf.ecx &= !(ecx1::HOST_ONLY | ecx1::OSXSAVE);
                if !self.nested_virtualization {
                    leaf.ecx &= !ecx1::VMX;
                }
                if !self.performance_counters {
                    leaf.ecx &= !ecx1::PDCM;
                }
                leaf.ecx |= ecx1::HYPERVISOR;
                leaf.edx &= !(edx1::HOST_ONLY | edx1::HTT);
                if place.count > 1 {
                    leaf.edx |= edx1::HTT;
                }
            }
            // Deterministic caches: all but the last level belong to one core.
            (4, _) if leaf.eax & 0x1f != 0 => {
                let shared = if cache_level(leaf.eax) >= 3 { last } else { 0 };
                leaf.eax = leaf.eax & 0x0000_3fff | shared.min(0xfff) << 14 | last.min(0x3f) << 26;
            }
            // MONITOR and MWAIT are not offered.
            (5, _) => {
                leaf = Leaf {
                    eax: 0,
                    ebx: 0,
                    ecx: 0,
                    edx: 0,
                    ..leaf
                }
            }
            // Of power management only a timer that does not stop (ARAT).
            (6, _) => {
                leaf = Leaf {
                    eax: leaf.eax & bit(2),
                    ebx: 0,
                    ecx: 0,
                    edx: 0,
                    ..leaf
                }
            }
            (7, 0) => {
                leaf.ebx &= !(bit(2) | bit(25)); // SGX, processor trace
                leaf.ecx &= !(bit(5) | bit(30)); // WAITPKG, SGX launch control
                leaf.edx &= !(bit(5) | bit(22) | bit(24) | bit(25)); // user interrupts, AMX
            }
            (7, 1) => leaf.eax &= !(bit(21)), // AMX-FP16
            (EXTENDED_STATE, 0) => leaf.eax &= !AMX_STATE,
            (0x8000_0001, _) => {
                leaf.ecx &= !ecx80000001::HOST_ONLY;
                if !self.nested_virtualization {
                    leaf.ecx &= !ecx80000001::SVM;
                }
                if !self.performance_counters {
                    leaf.ecx &= !ecx80000001::PERFORMANCE;
                }
            }
            (0x8000_0008, _) => {
                let host = leaf.eax & 0xff;
                let width = match u32::from(place.phys_bits) {
                    0 => host,
                    asked => asked.min(host),
                };
                leaf.eax = leaf.eax & 0x0000_ff00 | width;
                leaf.ecx = last.min(0xff) | id_bits(place.count) << 12;
                leaf.edx = 0;
            }
            // AMD's caches, with sharing where leaf 4 has it.
            (0x8000_001d, _) if leaf.eax & 0x1f != 0 => {
                let shared = if cache_level(leaf.eax) >= 3 { last } else { 0 };
                leaf.eax = leaf.eax & 0x0000_3fff | shared.min(0xfff) << 14;
            }
            // AMD's extended APIC id, core id with one thread, one node.
            (0x8000_001e, _) => {
                leaf.eax = place.id;
                leaf.ebx = place.id & 0xff;
                leaf.ecx = 0;
                leaf.edx = 0;
            }
            _ => {}
        }
        leaf
    }
}

/// The two levels of an extended topology: a core of one thread, and the package.
fn topology(place: Place) -> [Leaf; 3] {
    let level = |index, eax, ebx, kind: u32| Leaf {
        function: TOPOLOGY,
        index: Some(index),
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: place.id,
    };
    [
        level(0, 0, 1, 1),
        level(1, id_bits(place.count), place.count.min(0xffff), 2),
        level(2, 0, 0, 0),
    ]
}

/// Makes the size in leaf 0xd that of the components that are left.
fn size_extended_state(leaves: &mut [Leaf]) {
    // The legacy region and the header come first (Intel SDM volume 1, section "XSAVE Area").
    const HEAD: u32 = 512 + 64;
    let end = |leaf: &Leaf| match leaf.index {
        // Bit 0 of ECX: a supervisor component, which has no place in the standard format.
        Some(2..) if leaf.function == EXTENDED_STATE && leaf.ecx & 1 == 0 => {
            leaf.ebx.saturating_add(leaf.eax)
        }
        _ => 0,
    };
    let size = leaves.iter().map(end).max().unwrap_or(0).max(HEAD);
    let main = leaves
        .iter_mut()
        .find(|leaf| leaf.function == EXTENDED_STATE && leaf.index.unwrap_or(0) == 0);
    if let Some(main) = main {
        main.ecx = size;
    }
}

/// Bits of an APIC id that tell the vCPUs of the one package apart.
fn id_bits(count: u32) -> u32 {
    u32::BITS - count.saturating_sub(1).leading_zeros()
}

fn cache_level(eax: u32) -> u32 {
    eax >> 5 & 0x7
}

const fn bit(n: u32) -> u32 {
    1 << (n & 31)
}

/// Extended topology: x2APIC ids.
const TOPOLOGY: u32 = 0xb;
/// Components of the XSAVE area.
const EXTENDED_STATE: u32 = 0xd;
/// Tile configuration and tile data: need a permission of the process, and 8 KiB a vCPU.
const AMX_STATE: u32 = bit(17) | bit(18);

/// Leaf 1, ECX.
mod ecx1 {
    use super::bit;
    /// 64-bit debug store, MONITOR, CPL-qualified debug store, SMX, SpeedStep, thermal monitor 2.
    pub(super) const HOST_ONLY: u32 = bit(2) | bit(3) | bit(4) | bit(6) | bit(7) | bit(8);
    pub(super) const VMX: u32 = bit(5);
    /// Performance capabilities MSR.
    pub(super) const PDCM: u32 = bit(15);
    /// Reflects CR4; the hypervisor sets it as the guest runs.
    pub(super) const OSXSAVE: u32 = bit(27);
    pub(super) const HYPERVISOR: u32 = bit(31);
}

/// Leaf 1, EDX.
mod edx1 {
    use super::bit;
    /// Debug store, thermal MSRs, thermal monitor, pending break.
    pub(super) const HOST_ONLY: u32 = bit(21) | bit(22) | bit(29) | bit(31);
    pub(super) const HTT: u32 = bit(28);
}

/// Leaf 0x8000_0001, ECX.
mod ecx80000001 {
    use super::bit;
    /// Instruction-based sampling, SKINIT, watchdog, lightweight profiling, MWAITX.
    pub(super) const HOST_ONLY: u32 = bit(10) | bit(12) | bit(13) | bit(15) | bit(29);
    pub(super) const SVM: u32 = bit(2);
    /// Core, northbridge, time-stamp and last-level counters.
    pub(super) const PERFORMANCE: u32 = bit(23) | bit(24) | bit(27) | bit(28);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: Option<u32>, regs: [u32; 4]) -> Leaf {
        let [eax, ebx, ecx, edx] = regs;
        Leaf {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<Leaf> {
        let found = |leaf: &&Leaf| leaf.function == function && leaf.index.unwrap_or(0) == index;
        leaves.iter().find(found).copied()
    }

    const ALL: [u32; 4] = [u32::MAX; 4];

    fn host() -> Vec<Leaf> {
        vec![
            leaf(0, None, [0x1f, 0, 0, 0]),
            leaf(1, None, ALL),
            leaf(4, Some(0), [0xfc00_0121, 0, 0, 0]), // level 1
            leaf(4, Some(3), [0xfc00_0163, 0, 0, 0]), // level 3
            leaf(0xa, None, ALL),
            leaf(0xb, Some(0), ALL),
            leaf(0xd, Some(0), [0x6_00e7, 0, 11008, 0]),
            leaf(0xd, Some(2), [256, 576, 0, 0]),
            leaf(0xd, Some(9), [8, 2688, 0, 0]),
            leaf(0xd, Some(18), [8192, 2816, 0, 0]),
            leaf(0x4000_0000, None, [0x4000_0001, 1, 2, 3]),
            leaf(0x8000_0001, None, ALL),
            leaf(0x8000_0008, None, [0x302e, 0, 0, 0]),
            leaf(0x8000_000a, None, ALL),
        ]
    }

    const PLACE: Place = Place {
        id: 2,
        count: 3,
        phys_bits: 40,
    };

    #[test]
    fn a_vcpu_sees_its_own_id_in_every_leaf_that_has_one() {
        let leaves = CpuPolicy::default().leaves(&host(), PLACE);
        assert_eq!(find(&leaves, 1, 0).unwrap().ebx >> 24, 2);
        assert_eq!(find(&leaves, 0xb, 0).unwrap().edx, 2);
        assert_eq!(find(&leaves, 0xb, 1).unwrap().edx, 2);
    }

    #[test]
    fn the_topology_is_one_package_of_single_threaded_cores() {
        let leaves = CpuPolicy::default().leaves(&host(), PLACE);
        let core = find(&leaves, 0xb, 1).unwrap();
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 0x201));
        assert_eq!(find(&leaves, 4, 0).unwrap().eax >> 14 & 0xfff, 0);
        assert_eq!(find(&leaves, 4, 3).unwrap().eax >> 14 & 0xfff, 2);
        assert_eq!(leaves.iter().filter(|leaf| leaf.function == 0xb).count(), 3);
    }

    #[test]
    fn one_vcpu_needs_no_id_bits_and_has_no_siblings() {
        let place = Place {
            id: 0,
            count: 1,
            phys_bits: 0,
        };
        let leaves = CpuPolicy::default().leaves(&host(), place);
        assert_eq!(find(&leaves, 0xb, 1).unwrap().eax, 0);
        assert_eq!(find(&leaves, 1, 0).unwrap().edx & edx1::HTT, 0);
    }

    #[test]
    fn virtualization_and_counters_are_hidden_unless_asked_for() {
        let hidden = CpuPolicy::default().leaves(&host(), PLACE);
        assert_eq!(find(&hidden, 1, 0).unwrap().ecx & (ecx1::VMX | ecx1::PDCM), 0);
        assert_eq!(find(&hidden, 0x8000_0001, 0).unwrap().ecx & ecx80000001::SVM, 0);
        assert_eq!(find(&hidden, 0x8000_000a, 0), None);
        assert_eq!(find(&hidden, 0xa, 0), None);
        let all = CpuPolicy {
            nested_virtualization: true,
            performance_counters: true,
        };
        let shown = all.leaves(&host(), PLACE);
        assert_ne!(find(&shown, 1, 0).unwrap().ecx & ecx1::VMX, 0);
        assert!(find(&shown, 0x8000_000a, 0).is_some() && find(&shown, 0xa, 0).is_some());
    }

    #[test]
    fn the_extended_state_has_no_tiles_and_the_size_of_the_rest() {
        let leaves = CpuPolicy::default().leaves(&host(), PLACE);
        let main = find(&leaves, 0xd, 0).unwrap();
        assert_eq!((main.eax, main.ecx), (0xe7, 2696));
        assert_eq!(find(&leaves, 0xd, 18), None);
    }

    #[test]
    fn the_hypervisor_shows_itself_and_its_leaves() {
        let leaves = CpuPolicy::default().leaves(&host(), PLACE);
        assert_ne!(find(&leaves, 1, 0).unwrap().ecx & ecx1::HYPERVISOR, 0);
        assert_eq!(find(&leaves, 0x4000_0000, 0), find(&host(), 0x4000_0000, 0));
    }

    #[test]
    fn the_address_width_is_the_smaller_of_host_and_machine() {
        for (asked, width) in [(0, 46), (40, 40), (52, 46)] {
            let place = Place {
                phys_bits: asked,
                ..PLACE
            };
            let leaves = CpuPolicy::default().leaves(&host(), place);
            assert_eq!(find(&leaves, 0x8000_0008, 0).unwrap().eax, 0x3000 | width);
        }
    }
}
