//! The 16550 serial port: what a kernel prints before it has better, and when it panics.
//!
//! Output only; the register model is `vm-superio`'s.

use std::convert::Infallible;
use std::fmt::{self, Debug};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use caisson_hal::{Interrupts, Line};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Registers};

/// The port's eight registers.
pub struct Serial(Mutex<Registers<Edge, NoEvents, Out>>);

impl Serial {
    /// A port that gives each byte to `out`, and that interrupts where `interrupt` says.
    pub fn new(out: impl Fn(&[u8]) + Send + 'static, interrupt: Option<(Arc<dyn Interrupts>, Line)>) -> Self {
        Self(Mutex::new(Registers::new(Edge(interrupt), Out(Box::new(out)))))
    }

    /// Completes a load from the register at `offset`; the registers are one byte wide.
    pub fn load(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset @ 0..8), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            *byte = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    /// Completes a store to the register at `offset`.
    pub fn store(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset @ 0..8), Some(byte)) = (u8::try_from(offset), data.first()) {
            let mut registers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Neither the sink nor the interrupt fails.
            let _ = registers.write(offset, *byte);
        }
    }
}

impl Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Serial")
    }
}

/// The port's interrupt, edge-triggered as on an ISA bus.
struct Edge(Option<(Arc<dyn Interrupts>, Line)>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Some((interrupts, line)) = &self.0 {
            let outcome = interrupts
                .set_line(*line, true)
                .and_then(|()| interrupts.set_line(*line, false));
            if let Err(error) = outcome {
                tracing::debug!(%error, "serial interrupt went nowhere");
            }
        }
        Ok(())
    }
}

struct Out(Box<Sink>);

type Sink = dyn Fn(&[u8]) + Send;

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn bytes_that_the_guest_writes_come_out_and_the_transmitter_is_always_ready() {
        let (out, printed) = mpsc::channel();
        let serial = Serial::new(move |bytes| out.send(bytes.to_vec()).unwrap(), None);
        for byte in b"ok" {
            let mut status = [0];
            serial.load(5, &mut status);
            assert_eq!(status[0] & 0x20, 0x20);
            serial.store(0, &[*byte]);
        }
        assert_eq!(printed.try_iter().flatten().collect::<Vec<u8>>(), b"ok");
    }

    #[test]
    fn any_access_of_any_width_is_survived() {
        let serial = Serial::new(|_| {}, None);
        for offset in (0..20).chain([u64::MAX]) {
            for len in 0..9 {
                serial.store(offset, &vec![0xff; len]);
                serial.load(offset, &mut vec![0; len]);
            }
        }
    }
}
