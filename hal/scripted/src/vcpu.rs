//! The scripted vCPU.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caisson_hal::{Arch, Exit, GuestIo, Kicker, Result, Seat, Vcpu, VcpuId, Verdict};

use crate::{Record, Seen, States, Step, failed};

/// A scripted vCPU before its thread starts.
#[derive(Debug)]
pub struct ScriptedSeat<A: Arch> {
    id: VcpuId,
    script: VecDeque<Step<A>>,
    states: Option<States<A>>,
    record: Record,
    kicked: Arc<AtomicBool>,
}

impl<A: Arch> ScriptedSeat<A> {
    pub(crate) fn new(id: VcpuId, script: Vec<Step<A>>, states: Option<States<A>>, record: Record) -> Self {
        Self {
            id,
            script: script.into(),
            states,
            record,
            kicked: Arc::default(),
        }
    }
}

impl<A: Arch> Seat for ScriptedSeat<A> {
    type Arch = A;
    type Vcpu = ScriptedVcpu<A>;

    fn id(&self) -> VcpuId {
        self.id
    }

    fn kicker(&self) -> Kicker {
        let kicked = self.kicked.clone();
        Kicker::new(move || kicked.store(true, Ordering::Release))
    }

    fn bind(self) -> Result<ScriptedVcpu<A>> {
        Ok(ScriptedVcpu {
            seat: self,
            not_send: PhantomData,
        })
    }
}

/// A scripted vCPU. The marker makes it `!Send`, as HVF requires of the real one.
#[derive(Debug)]
pub struct ScriptedVcpu<A: Arch> {
    seat: ScriptedSeat<A>,
    not_send: PhantomData<*const ()>,
}

impl<A: Arch> Vcpu for ScriptedVcpu<A> {
    type Arch = A;

    fn run(&mut self, io: &mut dyn GuestIo) -> Result<Exit<A>> {
        let script = &mut self.seat.script;
        loop {
            if self.seat.kicked.swap(false, Ordering::AcqRel) {
                // A kick that came before the guest entered still ends its spin.
                script.pop_front_if(|step| matches!(step, Step::SpinUntilKicked));
                return Ok(Exit::Kicked);
            }
            let mismatch = match script.pop_front() {
                Some(Step::Store(at, data)) => {
                    io.store(at, &data);
                    None
                }
                Some(Step::PortOut(port, data)) => {
                    io.port_out(port, &data);
                    None
                }
                Some(Step::LoadExpect(at, want)) => {
                    let mut got = vec![0; want.len()];
                    io.load(at, &mut got);
                    mismatch(&format!("load at {:#x}", at.0), &want, &got)
                }
                Some(Step::PortExpect(port, want)) => {
                    let mut got = vec![0; want.len()];
                    io.port_in(port, &mut got);
                    mismatch(&format!("read of port {port:#x}"), &want, &got)
                }
                Some(Step::SpinUntilKicked) => {
                    script.push_front(Step::SpinUntilKicked);
                    std::thread::yield_now();
                    None
                }
                Some(Step::Exit(exit)) => return Ok(exit),
                None => Some("script ended without PowerOff".to_owned()),
            };
            if let Some(why) = mismatch {
                return Ok(Exit::Crash(why));
            }
            match io.verdict() {
                Some(Verdict::PowerOff) => return Ok(Exit::PowerOff),
                Some(Verdict::Reset) => return Ok(Exit::Reset),
                None => {}
            }
        }
    }

    fn set_boot_regs(&mut self, _regs: &A::BootRegs) -> Result<()> {
        self.seat.record.push(Seen::BootRegs(self.seat.id));
        Ok(())
    }

    fn save(&mut self) -> Result<A::VcpuState> {
        let states = self.seat.states.as_ref();
        states
            .map(|states| states.vcpu.clone())
            .ok_or_else(|| failed("save a vCPU", ErrorKind::Unsupported))
    }

    fn restore(&mut self, state: &A::VcpuState) -> Result<()> {
        match &self.seat.states {
            Some(states) if states.vcpu == *state => Ok(()),
            _ => Err(failed("restore a vCPU", ErrorKind::InvalidData)),
        }
    }
}

fn mismatch(what: &str, want: &[u8], got: &[u8]) -> Option<String> {
    let mut text = what.to_owned();
    // Writing to a string does not fail.
    let _ = write!(text, ": expected {want:02x?}, device answered {got:02x?}");
    (want != got).then_some(text)
}
