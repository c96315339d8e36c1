//! Saved state: neutral, versioned, checked when it is restored.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

/// Version of [`RootState`].
pub(super) const VERSION: u32 = 1;

/// Everything behind a PCI root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RootState {
    /// Version of this structure.
    pub version: u32,
    /// The functions, by slot.
    pub(super) functions: Vec<FunctionState>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FunctionState {
    pub(super) slot: u8,
    pub(super) config: Vec<u8>,
    pub(super) vectors: Vec<VectorState>,
    pub(super) transport: TransportState,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VectorState {
    pub(super) words: [u32; 4],
    pub(super) pending: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct TransportState {
    /// Virtio device type.
    pub(super) kind: u16,
    pub(super) status: u8,
    pub(super) features: u64,
    pub(super) feature_select: [u32; 2],
    pub(super) queue_select: u16,
    pub(super) queues: Vec<RingState>,
    pub(super) config_vector: u16,
    pub(super) isr: u8,
    pub(super) generation: u8,
    pub(super) broken: bool,
    /// The device's own state.
    pub(super) device: serde_json::Value,
}

/// A queue as the driver set it up and where the device stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RingState {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) vector: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

impl RingState {
    /// The queue that the device works on.
    pub(super) fn queue(&self, max: u16, event_index: bool) -> QueueState {
        QueueState {
            max_size: max,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_index,
            size: self.size,
            ready: self.enabled,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        }
    }
}
