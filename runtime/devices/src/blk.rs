//! Raw block devices (virtio 1.2, section 5.2) over a file or a host block device.
//!
//! The image is raw by definition: nothing in it is interpreted. Read-only is enforced here, whatever the
//! descriptor would allow. Data goes through a buffer of [`CHUNK`] bytes, the only memory a request can take.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::Bytes;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::thread::Role;
use crate::virtio::buffers::{Buffers, serve};
use crate::virtio::service::{Service, mask, read_config};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DriverFault, Kind, Memory, Queue, QueueHandler, VirtioDevice,
};

/// What a block device is made of.
#[derive(Debug)]
pub struct BlkConfig {
    /// The raw image.
    pub image: File,
    /// Refuse every write.
    pub read_only: bool,
    /// What the guest sees as serial number; 20 bytes at most.
    pub serial: String,
}

/// A block device.
#[derive(Debug)]
pub struct Blk {
    layout: Arc<Layout>,
    service: Service<Disk>,
}

/// What does not change about a disk.
#[derive(Debug)]
struct Layout {
    sectors: u64,
    read_only: bool,
    /// The image can give space back.
    sparse: bool,
}

impl Blk {
    /// A device over `config.image`, of as many whole sectors as that has now.
    ///
    /// # Errors
    /// Fails if the image has no size to ask for.
    pub fn new(config: BlkConfig) -> io::Result<Self> {
        let size = (&config.image).seek(SeekFrom::End(0))?;
        // Beyond the end there is nothing to lose, so this only asks.
        let sparse = !config.read_only
            && config.image.metadata()?.is_file()
            && fallocate(&config.image, PUNCH, size, SECTOR).is_ok();
        let layout = Arc::new(Layout {
            sectors: size / SECTOR,
            read_only: config.read_only,
            sparse,
        });
        let mut serial = [0; ID];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            layout: layout.clone(),
            service: Service::new(Disk {
                image: config.image,
                layout,
                serial,
                write_through: true,
                chunk: vec![0; CHUNK],
            }),
        })
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }

    fn features(&self) -> u64 {
        let common = mask([
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]);
        let read_only = if self.layout.read_only {
            mask([VIRTIO_BLK_F_RO])
        } else {
            0
        };
        let sparse = if self.layout.sparse {
            mask([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES])
        } else {
            0
        };
        common | read_only | sparse
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            capacity: self.layout.sectors.into(),
            size_max: SEGMENT.into(),
            seg_max: SEGMENTS.into(),
            blk_size: 512.into(),
            num_queues: [1, 0],
            max_discard_sectors: MOST_SECTORS.into(),
            max_discard_seg: RANGES.into(),
            discard_sector_alignment: 8.into(),
            max_write_zeroes_sectors: MOST_SECTORS.into(),
            max_write_zeroes_seg: RANGES.into(),
            write_zeroes_may_unmap: 1,
            ..Config::new_zeroed()
        };
        read_config(config.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // Without flushes the driver takes each write as done for good (section 5.2.6.2).
        let write_through = activation.features & mask([VIRTIO_BLK_F_FLUSH]) == 0;
        self.service.start("blk", Role::Block, activation, |disk| {
            disk.write_through = write_through
        })
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.service.stop()
    }
}

/// The image and how requests change it.
#[derive(Debug)]
struct Disk {
    image: File,
    layout: Arc<Layout>,
    serial: [u8; ID],
    write_through: bool,
    chunk: Vec<u8>,
}

impl QueueHandler for Disk {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        let Some(Some(active)) = queues.get_mut(index) else {
            return Ok(());
        };
        serve(active, memory, |buffers| self.request(buffers, memory))
    }
}

impl Disk {
    /// One request: a header, data, a byte of status. Says what it cost.
    fn request(&mut self, buffers: &mut Buffers, memory: &Memory) -> Result<u64, DriverFault> {
        let status_at = buffers
            .take_last()
            .ok_or(DriverFault::Request("a block request has no room for its status"))?;
        let mut header = Header::new_zeroed();
        if buffers.read(memory, header.as_mut_bytes())? < size_of::<Header>() {
            return Err(DriverFault::Request("a block request is shorter than its header"));
        }
        let cost = buffers.readable().saturating_add(buffers.writable());
        let sector = header.sector.get();
        let outcome = match header.kind.get() {
            _ if cost > MOST_DATA => Err(Refused::Io),
            VIRTIO_BLK_T_IN => self.read(sector, buffers, memory)?,
            VIRTIO_BLK_T_OUT => self.write(sector, buffers, memory)?,
            VIRTIO_BLK_T_FLUSH => self.image.sync_data().map_err(Refused::from),
            VIRTIO_BLK_T_GET_ID => buffers.write(memory, &self.serial).map(|_| Ok(()))?,
            VIRTIO_BLK_T_DISCARD => self.ranges(Change::Discard, buffers, memory)?,
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(Change::Zero, buffers, memory)?,
            _ => Err(Refused::Unsupported),
        };
        let status = match outcome {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Refused::Io) => VIRTIO_BLK_S_IOERR,
            Err(Refused::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        memory.write_obj(u8::try_from(status).unwrap_or(u8::MAX), status_at)?;
        if buffers.writable() == 0 {
            buffers.count(1); // the used length counts from the front without gaps
        }
        Ok(cost.max(SECTOR))
    }

    fn read(&mut self, sector: u64, buffers: &mut Buffers, memory: &Memory) -> Result<Outcome, DriverFault> {
        let Some(mut at) = self.layout.place(sector, buffers.writable()) else {
            return Ok(Err(Refused::Io));
        };
        while buffers.writable() > 0 {
            let len = usize::try_from(buffers.writable()).unwrap_or(CHUNK).min(CHUNK);
            let Some(chunk) = self.chunk.get_mut(..len) else {
                return Ok(Err(Refused::Io));
            };
            if let Err(error) = self.image.read_exact_at(chunk, at) {
                return Ok(Err(error.into()));
            }
            buffers.write(memory, chunk)?;
            at = at.saturating_add(len as u64);
        }
        Ok(Ok(()))
    }

    fn write(&mut self, sector: u64, buffers: &mut Buffers, memory: &Memory) -> Result<Outcome, DriverFault> {
        let Some(mut at) = self.layout.place(sector, buffers.readable()) else {
            return Ok(Err(Refused::Io));
        };
        if self.layout.read_only {
            return Ok(Err(Refused::Io));
        }
        while buffers.readable() > 0 {
            let len = buffers.read(memory, &mut self.chunk)?;
            let chunk = self.chunk.get(..len).unwrap_or_default();
            if let Err(error) = self.image.write_all_at(chunk, at) {
                return Ok(Err(error.into()));
            }
            at = at.saturating_add(len as u64);
        }
        Ok(self.settle())
    }

    /// Discards or zeroes a list of ranges.
    fn ranges(
        &mut self,
        change: Change,
        buffers: &mut Buffers,
        memory: &Memory,
    ) -> Result<Outcome, DriverFault> {
        let mut list = Vec::new();
        let mut range = Range::new_zeroed();
        while buffers.read(memory, range.as_mut_bytes())? == size_of::<Range>() {
            list.push(range);
            if list.len() > RANGES as usize {
                return Ok(Err(Refused::Io));
            }
        }
        Ok(list
            .iter()
            .try_for_each(|range| self.change(change, range))
            .and_then(|()| self.settle()))
    }

    fn change(&self, change: Change, range: &Range) -> Outcome {
        let unmap = match (change, range.flags.get()) {
            (Change::Discard, 0) => true,
            (Change::Zero, 0) => false,
            (Change::Zero, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => true,
            _ => return Err(Refused::Unsupported), // section 5.2.6.2
        };
        if self.layout.read_only {
            return Err(Refused::Io);
        }
        if !self.layout.sparse {
            return Err(Refused::Unsupported);
        }
        let sectors = range.sectors.get();
        let len = u64::from(sectors).saturating_mul(SECTOR);
        let at = self.layout.place(range.sector.get(), len);
        let at = at.filter(|_| sectors <= MOST_SECTORS).ok_or(Refused::Io)?;
        if len == 0 {
            return Ok(());
        }
        let mut outcome = Err(Errno::OPNOTSUPP);
        if !unmap {
            outcome = fallocate(&self.image, ZERO, at, len);
        }
        // Not every file system zeroes in place; a hole reads as zeros as well.
        if outcome == Err(Errno::OPNOTSUPP) {
            outcome = fallocate(&self.image, PUNCH, at, len);
        }
        outcome.map_err(|error| Refused::from(io::Error::from(error)))
    }

    fn settle(&self) -> Outcome {
        if self.write_through {
            self.image.sync_data()?;
        }
        Ok(())
    }
}

impl Layout {
    /// Where `len` bytes from `sector` on are in the image; `None` unless they are whole sectors of it.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        let inside = len.is_multiple_of(SECTOR) && end <= self.sectors;
        sector.checked_mul(SECTOR).filter(|_| inside)
    }
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Discard,
    Zero,
}

/// What the driver is told instead of success.
#[derive(Debug)]
enum Refused {
    Io,
    Unsupported,
}

type Outcome = Result<(), Refused>;

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        tracing::debug!(%error, "block request failed");
        Self::Io
    }
}

/// `struct virtio_blk_req` (section 5.2.6).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes` (section 5.2.6).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Range {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// `struct virtio_blk_config` (section 5.2.4), up to what is offered.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    topology: [u8; 8],
    writeback: [u8; 2],
    num_queues: [u8; 2],
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused: [u8; 3],
}

/// The unit of `capacity` and of every request, whatever `blk_size` (section 5.2.4).
const SECTOR: u64 = 512;
/// `VIRTIO_BLK_ID_BYTES` (section 5.2.6.1).
const ID: usize = 20;
/// Bytes moved at a time.
const CHUNK: usize = 128 * 1024;
/// Most bytes of a segment and most segments of a request: together the most that a request may move.
const SEGMENT: u32 = 64 * 1024;
const SEGMENTS: u32 = 254;
const MOST_DATA: u64 = SEGMENT as u64 * SEGMENTS as u64;
/// Most ranges of a request and most sectors of a range: 1 GiB.
const RANGES: u32 = 16;
const MOST_SECTORS: u32 = 2 << 20;
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

#[cfg(test)]
mod tests;
