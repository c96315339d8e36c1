//! The MSI-X table of one function (PCI Local Bus 3.0, section 6.8.2).

use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_hal::{GuestAddress, Interrupts, Msi};

use super::state::VectorState;

/// Bytes of a table entry.
pub(super) const ENTRY: u64 = 16;
/// Message control: the function is masked.
pub(super) const CONTROL_MASK: u16 = 1 << 14;
/// Message control: MSI-X is enabled.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

/// Vectors, their masks and what waits behind them.
pub(super) struct Msix {
    interrupts: Arc<dyn Interrupts>,
    /// PCI requester id.
    requester: u32,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
}

#[derive(Clone, Copy, Debug)]
struct Vector {
    /// Address low and high, data, control.
    words: [u32; 4],
    pending: bool,
}

impl Msix {
    /// `vectors` vectors, all masked, in a function that has MSI-X disabled.
    pub(super) fn new(vectors: usize, requester: u32, interrupts: Arc<dyn Interrupts>) -> Self {
        let vector = Vector {
            words: [0, 0, 0, MASKED],
            pending: false,
        };
        Self {
            interrupts,
            requester,
            table: Mutex::new(Table {
                enabled: false,
                masked: false,
                vectors: vec![vector; vectors],
            }),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lock().vectors.len()
    }

    pub(super) fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Raises `vector`, or notes it as pending while it is masked.
    pub(super) fn raise(&self, vector: u16) {
        let message = {
            let mut table = self.lock();
            let open = !table.masked;
            if !table.enabled {
                return;
            }
            match table.vectors.get_mut(usize::from(vector)) {
                Some(entry) if open && !entry.masked() => Some(entry.message(self.requester)),
                Some(entry) => {
                    entry.pending = true;
                    None
                }
                None => None,
            }
        };
        self.send(message);
    }

    /// Takes the message control register as the guest left it.
    pub(super) fn control(&self, control: u16) {
        let due = {
            let mut table = self.lock();
            table.enabled = control & CONTROL_ENABLE != 0;
            table.masked = control & CONTROL_MASK != 0;
            table.due(self.requester)
        };
        self.send(due);
    }

    /// A load from the table.
    pub(super) fn load(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let bytes = table
            .vectors
            .iter()
            .flat_map(|vector| vector.words)
            .flat_map(u32::to_le_bytes);
        fill(data, offset, bytes);
    }

    /// A store to the table: aligned dwords and quadwords, nothing else (section 6.8.2).
    pub(super) fn store(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let due = {
            let mut table = self.lock();
            let first = usize::try_from(offset / 4).unwrap_or(usize::MAX);
            let words = table.vectors.iter_mut().flat_map(|vector| &mut vector.words);
            for (word, bytes) in words.skip(first).zip(data.chunks_exact(4)) {
                *word = bytes.try_into().map_or(0, u32::from_le_bytes);
            }
            table.due(self.requester)
        };
        self.send(due);
    }

    /// A load from the array of pending bits.
    pub(super) fn load_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let bytes = table.vectors.chunks(8).map(|vectors| {
            let bits = vectors.iter().enumerate();
            bits.fold(0, |byte, (bit, vector)| byte | u8::from(vector.pending) << bit)
        });
        fill(data, offset, bytes);
    }

    pub(super) fn save(&self) -> Vec<VectorState> {
        let saved = |vector: &Vector| VectorState {
            words: vector.words,
            pending: vector.pending,
        };
        self.lock().vectors.iter().map(saved).collect()
    }

    pub(super) fn restore(&self, saved: &[VectorState]) -> Result<(), String> {
        let mut table = self.lock();
        if saved.len() != table.vectors.len() {
            return Err(format!("{} interrupt vectors", saved.len()));
        }
        for (vector, saved) in table.vectors.iter_mut().zip(saved) {
            (vector.words, vector.pending) = (saved.words, saved.pending);
        }
        Ok(())
    }

    fn send(&self, messages: impl IntoIterator<Item = Msi>) {
        for message in messages {
            if let Err(error) = self.interrupts.send_msi(message) {
                // The guest wrote the address.
                tracing::debug!(%error, ?message, "interrupt went nowhere");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// What was pending and is masked no longer.
    fn due(&mut self, requester: u32) -> Vec<Msi> {
        if !self.enabled || self.masked {
            return Vec::new();
        }
        let open = self.vectors.iter_mut().filter(|vector| !vector.masked());
        open.filter_map(|vector| std::mem::take(&mut vector.pending).then(|| vector.message(requester)))
            .collect()
    }
}

impl Vector {
    fn masked(&self) -> bool {
        let [.., control] = self.words;
        control & MASKED != 0
    }

    fn message(&self, requester: u32) -> Msi {
        let [low, high, data, _] = self.words;
        Msi {
            address: GuestAddress(u64::from(high) << 32 | u64::from(low)),
            data,
            device: Some(requester),
        }
    }
}

impl Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("requester", &self.requester)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

/// Fills `data` with `bytes` from `offset` on, and with zeros beyond their end.
pub(super) fn fill(data: &mut [u8], offset: u64, bytes: impl Iterator<Item = u8>) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    data.fill(0);
    for (to, from) in data.iter_mut().zip(bytes.skip(offset)) {
        *to = from;
    }
}
