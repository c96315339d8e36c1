//! The guest's RAM.

use std::io;
use std::sync::Arc;

use caisson_arch_x86_64::layout::Layout;
use caisson_devices::virtio::{GuestAddress, Memory};
use caisson_hal::Region;
use vm_memory::GuestRegionMmap;

use crate::sys;

/// RAM as it was reserved: no page is there before the guest touches it.
#[derive(Debug)]
pub(crate) struct Ram {
    /// As devices see it.
    pub(crate) memory: Memory,
    /// As the hypervisor maps it.
    pub(crate) regions: Vec<(GuestAddress, Arc<Region>)>,
}

impl Ram {
    /// Reserves the ranges of `layout`.
    ///
    /// The pages are private to this process and stay out of core dumps.
    pub(crate) fn reserve(layout: &Layout) -> io::Result<Self> {
        let regions = layout
            .ram
            .iter()
            .map(|range| {
                let size = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
                let region = Region::new(size).map_err(io::Error::other)?;
                sys::keep_out_of_dumps(&region)?;
                Ok((GuestAddress(range.start), Arc::new(region)))
            })
            .collect::<io::Result<Vec<_>>>()?;
        let mapped = regions.iter().filter_map(|(at, region)| {
            // `None` is a range that wraps around, which a layout has not.
            GuestRegionMmap::with_arc(region.clone(), *at)
        });
        let memory = Memory::from_regions(mapped.collect()).map_err(io::Error::other)?;
        Ok(Self { memory, regions })
    }

    /// How many bytes of it are backed by host pages.
    pub(crate) fn resident(&self) -> u64 {
        self.regions
            .iter()
            .map(|(_, region)| sys::resident(region).unwrap_or(0))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_arch_x86_64::layout::MIB;
    use vm_memory::Bytes as _;

    #[test]
    fn only_touched_pages_are_resident() {
        // Beyond the hole, so that there are two ranges. Nothing is touched but what is written.
        let ram = Ram::reserve(&Layout::new(5 * 1024 * MIB).unwrap()).unwrap();
        assert_eq!(ram.regions.len(), 2);
        let before = ram.resident();
        ram.memory.write_obj(1u8, GuestAddress(0x1234)).unwrap();
        ram.memory.write_obj(1u8, GuestAddress(4096 * MIB)).unwrap();
        let after = ram.resident();
        assert_eq!(before, 0);
        assert!((8192..=8 * MIB).contains(&after), "{after}");
    }
}
