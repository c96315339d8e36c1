//! Serves a device to another process over vhost-user: how QEMU's guest gets our devices.
//!
//! One thread a connection reads the frontend's messages; the device starts its own workers as it does behind
//! our own transport. Everything the frontend says is checked: it runs the guest and may be the guest's.
//! A restart of the frontend's rings (a pause) is a `deactivate` and an `activate` of the device.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use caisson_hal::os::Event;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::thread::{Role, Threads};
use crate::virtio::{Activation, ActiveQueue, Memory, Queue, QueueT, Signal, VirtioDevice};

/// Most bytes of configuration space in one message.
const CONFIG: u32 = 256;

/// Serves `device` to the frontend at the other end of `stream`, until that end closes.
///
/// # Errors
/// Fails if the system refuses another thread.
pub fn serve(
    device: Box<dyn VirtioDevice>,
    stream: UnixStream,
    threads: &Threads,
    name: &str,
) -> io::Result<JoinHandle<()>> {
    let backend = Backend::new(device, threads.clone());
    threads.spawn(Role::Small, name, move || {
        let backend = Arc::new(Mutex::new(backend));
        let mut requests = BackendReqHandler::from_stream(stream, backend.clone());
        let end = loop {
            if let Err(error) = requests.handle_request() {
                break error;
            }
        };
        backend.lock().unwrap_or_else(PoisonError::into_inner).rest();
        match end {
            Error::Disconnected => tracing::debug!("vhost-user frontend left"),
            error => tracing::warn!(%error, "vhost-user frontend was cut off"),
        }
    })
}

/// A device and what its frontend has said so far.
#[derive(Debug)]
struct Backend {
    device: Box<dyn VirtioDevice>,
    threads: Threads,
    features: u64,
    regions: Vec<Region>,
    memory: Option<Memory>,
    rings: Vec<Ring>,
    /// The rings that the device works on, in the order of its queues.
    active: Vec<usize>,
}

/// A stretch of guest memory, as the frontend's own addresses name it.
#[derive(Clone, Copy, Debug)]
struct Region {
    user: u64,
    guest: u64,
    size: u64,
}

#[derive(Debug)]
struct Ring {
    max: u16,
    size: u16,
    base: u16,
    /// Descriptors, available ring and used ring, as addresses of the frontend.
    at: Option<[u64; 3]>,
    kick: Option<Event>,
    call: Arc<Call>,
    enabled: bool,
}

/// The frontend's interrupt, which it may exchange while the device runs.
#[derive(Debug, Default)]
struct Call(Mutex<Option<Event>>);

impl Signal for Call {
    fn signal(&self) {
        if let Some(event) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            event.signal();
        }
    }
}

/// What has no channel in the protocol as negotiated.
#[derive(Debug)]
struct Unheard(&'static str);

impl Signal for Unheard {
    fn signal(&self) {
        tracing::debug!(what = self.0, "vhost-user frontend cannot be told");
    }
}

impl Backend {
    fn new(device: Box<dyn VirtioDevice>, threads: Threads) -> Self {
        let rings = device
            .queue_sizes()
            .into_iter()
            .map(|max| Ring {
                max,
                size: 0,
                base: 0,
                at: None,
                kick: None,
                call: Arc::default(),
                enabled: false,
            })
            .collect();
        Self {
            device,
            threads,
            features: 0,
            regions: Vec::new(),
            memory: None,
            rings,
            active: Vec::new(),
        }
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn translate(&self, user: u64) -> Result<u64> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = user.checked_sub(region.user)?;
                (offset < region.size).then(|| region.guest.checked_add(offset))?
            })
            .ok_or(Error::InvalidParam)
    }

    /// Stops the device and notes where each of its rings stood.
    fn rest(&mut self) {
        let queues = self.device.deactivate();
        for (index, queue) in std::mem::take(&mut self.active).into_iter().zip(queues) {
            if let Some(ring) = self.rings.get_mut(index) {
                ring.base = queue.next_avail();
            }
        }
    }

    /// Starts the device on every ring that is ready, if that is not what it works on already.
    fn start(&mut self) -> Result<()> {
        let ready: Vec<usize> = (0..self.rings.len())
            .filter(|index| self.rings.get(*index).is_some_and(Ring::is_ready))
            .collect();
        if ready == self.active {
            return Ok(());
        }
        self.rest();
        let Some(memory) = self.memory.clone() else {
            return Err(Error::InvalidOperation("no memory table"));
        };
        let mut queues: Vec<Option<ActiveQueue>> = Vec::new();
        for (index, ring) in self.rings.iter().enumerate() {
            let queue = ready
                .contains(&index)
                .then(|| self.queue(ring, &memory))
                .transpose()?;
            queues.push(queue);
        }
        self.device
            .activate(Activation {
                memory,
                features: self.features,
                queues,
                config_changed: Arc::new(Unheard("configuration change")),
                broken: Arc::new(Unheard("broken driver")),
                threads: self.threads.clone(),
            })
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.active = ready;
        Ok(())
    }

    fn queue(&self, ring: &Ring, memory: &Memory) -> Result<ActiveQueue> {
        let mut queue = Queue::new(ring.max).map_err(|_| Error::BackendInternalError)?;
        queue.set_size(ring.size);
        let [descriptors, available, used] = ring.at.ok_or(Error::InvalidParam)?;
        let (low, high) = halves(self.translate(descriptors)?);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.translate(available)?);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.translate(used)?);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_next_avail(ring.base);
        queue.set_ready(true);
        if !queue.is_valid(memory) || queue.size() != ring.size {
            return Err(Error::InvalidParam);
        }
        let used = queue
            .used_idx(memory, std::sync::atomic::Ordering::Acquire)
            .map_err(|_| Error::InvalidParam)?;
        queue.set_next_used(used.0);
        let kick = ring.kick.as_ref().ok_or(Error::InvalidParam)?;
        Ok(ActiveQueue {
            queue,
            kick: kick.try_clone().map_err(Error::ReqHandlerError)?,
            interrupt: ring.call.clone(),
        })
    }
}

impl Ring {
    fn is_ready(&self) -> bool {
        self.enabled && self.kick.is_some() && self.at.is_some() && self.size > 0
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.rest();
        for ring in &mut self.rings {
            (ring.enabled, ring.kick, ring.at) = (false, None, None);
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & !(self.device.features() | protocol) != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features & !protocol;
        if features & protocol == 0 {
            // Without protocol features a ring needs no SET_VRING_ENABLE.
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        let mapped = regions.iter().zip(files).map(|(region, file)| {
            let size = usize::try_from(region.memory_size).map_err(|_| Error::InvalidParam)?;
            let file = FileOffset::new(file, region.mmap_offset);
            let mapping = MmapRegion::from_file(file, size)
                .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)
        });
        let mut mapped = mapped.collect::<Result<Vec<_>>>()?;
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let memory = Memory::from_regions(mapped).map_err(|_| Error::InvalidParam)?;
        let running = !self.active.is_empty();
        self.rest();
        self.memory = Some(memory);
        self.regions = regions
            .iter()
            .map(|region| Region {
                user: region.user_addr,
                guest: region.guest_phys_addr,
                size: region.memory_size,
            })
            .collect();
        if running {
            self.start()?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let ring = self.ring(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if size > ring.max || !size.is_power_of_two() {
            return Err(Error::InvalidParam);
        }
        ring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        for address in [descriptor, available, used] {
            self.translate(address)?;
        }
        self.ring(index)?.at = Some([descriptor, available, used]);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    /// Stops the ring. The device rests on its others too until the frontend starts one again.
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.ring(index)?;
        self.rest();
        let ring = self.ring(index)?;
        ring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.ok_or(Error::InvalidOperation(
            "a ring without a kick would have to be polled",
        ))?;
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| Error::ReqHandlerError(error.into()))?;
        self.ring(u32::from(index))?.kick = Some(Event::from_fd(fd.into()));
        self.start()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        if let Some(fd) = &fd {
            rustix::io::ioctl_fionbio(fd, true).map_err(|error| Error::ReqHandlerError(error.into()))?;
        }
        let call = self.ring(u32::from(index))?.call.clone();
        *call.0.lock().unwrap_or_else(PoisonError::into_inner) = fd.map(|fd| Event::from_fd(fd.into()));
        call.signal(); // what was used in between went to the old one
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index)).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        self.start()
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if size > CONFIG {
            return Err(Error::InvalidParam);
        }
        let mut bytes = vec![0; size as usize];
        self.device.read_config(u64::from(offset), &mut bytes);
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(u64::from(offset), bytes);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(NOT_OFFERED)
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<vhost::VhostUserMemoryRegionBase>> {
        Err(NOT_OFFERED)
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}

/// The answer to what only protocol features that we do not offer would allow.
const NOT_OFFERED: Error = Error::InvalidOperation("the feature was not offered");

fn halves(address: u64) -> (Option<u32>, Option<u32>) {
    let low = u32::try_from(address & u64::from(u32::MAX)).ok();
    (low, u32::try_from(address >> 32).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vsock::{GUEST_CID, HostPorts, Vsock};

    #[derive(Debug)]
    struct Nobody;

    impl HostPorts for Nobody {
        fn accept(&self, _port: u32, _stream: UnixStream) -> bool {
            false
        }
    }

    fn backend() -> Backend {
        Backend::new(
            Box::new(Vsock::new(GUEST_CID, Arc::new(Nobody))),
            Threads::plain(),
        )
    }

    #[test]
    fn addresses_outside_the_memory_table_do_not_translate() {
        let mut backend = backend();
        backend.regions = vec![Region {
            user: 0x10_0000,
            guest: 0x1000,
            size: 0x2000,
        }];
        for (user, want) in [
            (0x10_0000, Some(0x1000)),
            (0x10_1fff, Some(0x2fff)),
            (0x10_2000, None),
            (0xf_ffff, None),
            (u64::MAX, None),
        ] {
            assert_eq!(backend.translate(user).ok(), want, "{user:#x}");
        }
    }

    #[test]
    fn rings_that_do_not_exist_and_sizes_that_virtio_forbids_are_refused() {
        let mut backend = backend();
        for (index, size, good) in [
            (0, 256, true),
            (0, 0, false),
            (0, 100, false),
            (0, 512, false),
            (3, 16, false),
        ] {
            assert_eq!(backend.set_vring_num(index, size).is_ok(), good, "{index} {size}");
        }
        assert!(
            backend
                .set_vring_addr(0, VhostUserVringAddrFlags::empty(), 0, 0, 0, 0)
                .is_err()
        );
        assert!(backend.set_features(1 << 60).is_err());
        assert!(
            backend
                .get_config(0, CONFIG + 1, VhostUserConfigFlags::empty())
                .is_err()
        );
    }

    #[test]
    fn the_service_ends_when_its_frontend_leaves() {
        let (ours, frontend) = UnixStream::pair().expect("pair");
        let device = Box::new(Vsock::new(GUEST_CID, Arc::new(Nobody)));
        let served = serve(device, ours, &Threads::plain(), "vhost-test").expect("thread");
        drop(frontend);
        served.join().expect("the service does not panic");
    }
}
