//! The guest's buffers of one request, in order.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// Buffers and how far they have been used.
#[derive(Debug, Default)]
pub(super) struct Buffers<'a> {
    slices: Vec<VolatileSlice<'a>>,
    first: usize,
    left: usize,
}

impl<'a> Buffers<'a> {
    pub(super) fn new(slices: Vec<VolatileSlice<'a>>) -> Self {
        let left = slices
            .iter()
            .fold(0usize, |sum, slice| sum.saturating_add(slice.len()));
        Self {
            slices,
            first: 0,
            left,
        }
    }

    /// Bytes left.
    pub(super) fn len(&self) -> usize {
        self.left
    }

    /// Leaves out everything beyond `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        self.left = self.left.min(len);
    }

    /// What lies behind the first `len` bytes, which alone remain here; nothing if there are fewer.
    pub(super) fn split_behind(&mut self, len: usize) -> Option<Self> {
        if len > self.left {
            return None;
        }
        let mut behind = Self {
            slices: self.slices.clone(),
            ..*self
        };
        let mut skipped = 0usize;
        while skipped < len {
            skipped = skipped.saturating_add(behind.next(len.saturating_sub(skipped))?.len());
        }
        self.truncate(len);
        Some(behind)
    }

    /// Takes as many bytes as `bytes` has, or nothing if there are fewer.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Option<()> {
        if bytes.len() > self.left {
            return None;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let slice = self.next(rest.len())?;
            let (now, later) = rest.split_at_mut_checked(slice.len())?;
            slice.copy_to(now);
            rest = later;
        }
        Some(())
    }

    /// Puts `bytes`, or nothing if there is no room.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Option<()> {
        if bytes.len() > self.left {
            return None;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let slice = self.next(rest.len())?;
            let (now, later) = rest.split_at_checked(slice.len())?;
            slice.copy_from(now);
            rest = later;
        }
        Some(())
    }

    /// Fills the room from where `file` stands, until its end.
    pub(super) fn fill(&mut self, mut file: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.transfer(|slice| file.read_volatile(slice))
    }

    /// Writes what is left to where `file` stands.
    pub(super) fn drain(&mut self, mut file: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.transfer(|slice| file.write_volatile(slice))
    }

    fn transfer(
        &mut self,
        mut step: impl FnMut(&mut VolatileSlice<'a>) -> Result<usize, VolatileMemoryError>,
    ) -> Result<usize, Errno> {
        let mut total = 0usize;
        while let Some(mut slice) = self.next(usize::MAX) {
            match step(&mut slice) {
                Ok(done) => {
                    total = total.saturating_add(done);
                    if done < slice.len() {
                        break;
                    }
                }
                Err(_) if total > 0 => break,
                Err(VolatileMemoryError::IOError(error)) => {
                    return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
                }
                Err(_) => return Err(Errno::FAULT),
            }
        }
        Ok(total)
    }

    /// The next contiguous piece, of at most `most` bytes.
    fn next(&mut self, most: usize) -> Option<VolatileSlice<'a>> {
        loop {
            let slice = self.slices.get_mut(self.first)?;
            let len = slice.len().min(most).min(self.left);
            if self.left == 0 {
                return None;
            }
            if len == 0 {
                self.first = self.first.saturating_add(1);
                continue;
            }
            let now = slice.subslice(0, len).ok()?;
            *slice = slice.offset(len).ok()?;
            self.left = self.left.saturating_sub(len);
            return Some(now);
        }
    }
}
