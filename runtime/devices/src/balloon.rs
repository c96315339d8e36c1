//! The memory balloon (virtio 1.2, section 5.5): pages that the guest does not use go back to the host.
//!
//! Two ways: the guest *reports* free pages by itself, and the host can ask for pages by a target.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;

use crate::sys::discard;
use crate::thread::Role;
use crate::virtio::buffers::{Buffers, serve};
use crate::virtio::service::{Service, mask, read_config};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DriverFault, Kind, Memory, Queue, QueueHandler, Signal,
    VirtioDevice,
};

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    control: BalloonControl,
    service: Service<Pages>,
}

/// The host's hand on a balloon, wherever the device itself is. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct BalloonControl(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    changed: Mutex<Option<Arc<dyn Signal>>>,
}

impl Balloon {
    /// An empty balloon with an empty target.
    #[expect(clippy::new_without_default, reason = "as every other device is made")]
    pub fn new() -> Self {
        Self {
            control: BalloonControl::default(),
            service: Service::new(Pages),
        }
    }

    /// What sets its target.
    pub fn control(&self) -> BalloonControl {
        self.control.clone()
    }
}

impl BalloonControl {
    /// Asks the guest to give up `pages` pages of 4 KiB in all.
    pub fn set_target(&self, pages: u32) {
        self.0.target.store(pages, Ordering::Release);
        let changed = self
            .0
            .changed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(changed) = changed {
            changed.signal();
        }
    }

    /// Pages that the guest says it has given up.
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::Acquire)
    }

    fn tell(&self, changed: Option<Arc<dyn Signal>>) {
        *self.0.changed.lock().unwrap_or_else(PoisonError::into_inner) = changed;
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 32]
    }

    fn features(&self) -> u64 {
        mask([
            F_DEFLATE_ON_OOM,
            F_REPORTING,
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ])
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let target = self.control.0.target.load(Ordering::Acquire);
        let config = u64::from(self.control.actual()) << 32 | u64::from(target);
        read_config(&config.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == ACTUAL
            && let Ok(actual) = data.try_into()
        {
            let actual = u32::from_le_bytes(actual);
            self.control.0.actual.store(actual, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let changed = activation.config_changed.clone();
        self.service.start("balloon", Role::Small, activation, |_| {})?;
        self.control.tell(Some(changed));
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.control.tell(None);
        self.service.stop()
    }

    fn save(&self) -> serde_json::Value {
        let target = self.control.0.target.load(Ordering::Acquire);
        json!({ "version": 1, "target": target, "actual": self.control.actual() })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), String> {
        let number = |name: &str| {
            let number = state.get(name).and_then(serde_json::Value::as_u64);
            number
                .and_then(|number| u32::try_from(number).ok())
                .ok_or_else(|| format!("the balloon's state has no {name}"))
        };
        if number("version")? != 1 {
            return Err("the state is not one of this balloon's".into());
        }
        let (target, actual) = (number("target")?, number("actual")?);
        self.control.0.target.store(target, Ordering::Release);
        self.control.0.actual.store(actual, Ordering::Release);
        Ok(())
    }
}

/// Lets pages go.
#[derive(Debug)]
struct Pages;

impl QueueHandler for Pages {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        let Some(Some(active)) = queues.get_mut(index) else {
            return Ok(());
        };
        serve(active, memory, |buffers| match index {
            INFLATE => inflate(buffers, memory),
            REPORTING => Ok(report(buffers, memory)),
            _ => Ok(0), // deflating: the guest's next touch brings the page back
        })
    }
}

/// The guest has put pages into the balloon: an array of page numbers (section 5.5.6).
fn inflate(buffers: &mut Buffers, memory: &Memory) -> Result<u64, DriverFault> {
    let mut array = vec![0; MOST_ARRAY];
    let len = buffers.read(memory, &mut array)?;
    array.truncate(len);
    let numbers = array.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok());
    let mut numbers: Vec<u64> = numbers.map(u32::from_le_bytes).map(u64::from).collect();
    numbers.sort_unstable();
    let mut total = 0u64;
    for run in numbers.chunk_by(|page, next| *next == page.saturating_add(1)) {
        if let Some(first) = run.first() {
            let bytes = (run.len() as u64).saturating_mul(PAGE);
            let at = GuestAddress(first.saturating_mul(PAGE));
            total = total.saturating_add(discard(memory, at, bytes));
        }
    }
    Ok(total.max(PAGE))
}

/// The guest has pages that nobody uses: the buffers themselves (section 5.5.6, free page reporting).
fn report(buffers: &Buffers, memory: &Memory) -> u64 {
    let parts = buffers.parts_to_fill();
    parts.fold(PAGE, |total, (at, len)| {
        total.saturating_add(discard(memory, at, len as u64))
    })
}

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` and `VIRTIO_BALLOON_F_PAGE_REPORTING` (section 5.5.3).
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;
/// Page of the balloon, whatever the pages of guest and host (section 5.5.6).
const PAGE: u64 = 4096;
/// Most bytes of an array of page numbers; Linux sends 1 KiB.
const MOST_ARRAY: usize = 64 * 1024;
/// Offset of `actual` in `struct virtio_balloon_config`.
const ACTUAL: u64 = 4;
const INFLATE: usize = 0;
/// Without the queues of statistics and hints, which are not offered, the reporting queue is the third.
const REPORTING: usize = 2;
