//! The threads that run vCPUs.
//!
//! Orders go in by channel and are followed by a kick; reports come out by channel. A thread is in one of two
//! states: it waits for an order, or it runs the guest until a kick brings an order or the guest ends.
//!
//! **Invariant:** the machine's end is reported once, whichever vCPU sees it and how often.
//! **Invariant:** whoever waits for a vCPU has a deadline.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use caisson_devices::thread::{Role, Threads};
use caisson_hal::{Arch, Exit, Failed, GuestIo, Kicker, Seat, Vcpu, VcpuId};
use caisson_wire::vmm::End;

use crate::sys::Clock;

/// Longest time that a vCPU may take to come out of the guest, or to start.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// Tells the machine's end, once, and stops the other vCPUs.
#[derive(Clone, Debug)]
pub(crate) struct Ending(Arc<Told>);

#[derive(Debug)]
struct Told {
    over: AtomicBool,
    tell: Sender<End>,
    kickers: Vec<Kicker>,
}

impl Ending {
    /// `kickers` are those of all vCPUs.
    pub(crate) fn new(tell: Sender<End>, kickers: Vec<Kicker>) -> Self {
        Self(Arc::new(Told {
            over: AtomicBool::new(false),
            tell,
            kickers,
        }))
    }

    /// Reports `end` if it is the first.
    fn tell(&self, end: End) {
        if self.0.over.swap(true, Ordering::AcqRel) {
            return;
        }
        // Nobody to tell is somebody who no longer wants to know.
        let _ = self.0.tell.send(end);
        self.0.kickers.iter().for_each(Kicker::kick);
    }

    fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Acquire)
    }
}

/// What a thread is told.
#[derive(Clone, Copy, Debug)]
enum Order {
    Run,
    /// Come out, and repeat the number.
    Pause(u64),
    Leave,
}

/// What a thread says.
#[derive(Debug)]
enum Report {
    Ready,
    Paused(u64),
    Failed(Failed),
}

/// One thread, from outside.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    id: VcpuId,
    orders: Sender<Order>,
    reports: Receiver<Report>,
    kicker: Kicker,
    clock: Arc<OnceLock<Clock>>,
    thread: JoinHandle<()>,
}

/// A vCPU that did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuError {
    #[error("vCPU {id}: {cause}", id = .0.0, cause = .1)]
    Failed(VcpuId, #[source] Failed),
    #[error("vCPU {id} does not answer", id = .0.0)]
    Silent(VcpuId),
    #[error("vCPU {id} has no thread", id = .0.0)]
    Gone(VcpuId),
}

impl VcpuThread {
    /// Starts the thread of `seat`, which waits for [`VcpuThread::run`].
    pub(crate) fn spawn<S: Seat>(
        threads: &Threads,
        seat: S,
        entry: Option<<S::Arch as Arch>::BootRegs>,
        io: impl GuestIo + Send + 'static,
        ending: Ending,
    ) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let (outbox, reports) = channel();
        let (id, kicker) = (seat.id(), seat.kicker());
        let clock = Arc::new(OnceLock::new());
        let own = clock.clone();
        let thread = threads.spawn(Role::Vcpu, format!("vcpu{}", id.0), move || {
            if let Some(clock) = Clock::of_this_thread() {
                let _ = own.set(clock);
            }
            serve(seat, entry, io, &Line { inbox, outbox }, &ending);
        })?;
        Ok(Self {
            id,
            orders,
            reports,
            kicker,
            clock,
            thread,
        })
    }

    /// Waits until the vCPU can run.
    pub(crate) fn ready(&self, deadline: Instant) -> Result<(), VcpuError> {
        match self.next(deadline)? {
            Report::Failed(cause) => Err(VcpuError::Failed(self.id, cause)),
            Report::Ready | Report::Paused(_) => Ok(()),
        }
    }

    /// Lets it run.
    pub(crate) fn run(&self) {
        self.order(Order::Run);
    }

    /// Takes it out of the guest; [`VcpuThread::paused`] waits for that.
    pub(crate) fn pause(&self, number: u64) {
        self.order(Order::Pause(number));
    }

    /// Waits until it is out, as [`VcpuThread::pause`] with the same number asked.
    pub(crate) fn paused(&self, number: u64, deadline: Instant) -> Result<(), VcpuError> {
        loop {
            match self.next(deadline)? {
                Report::Paused(answer) if answer == number => return Ok(()),
                // The late answer to an order that was given up on.
                Report::Paused(_) | Report::Ready => {}
                Report::Failed(cause) => return Err(VcpuError::Failed(self.id, cause)),
            }
        }
    }

    /// Tells it to end; [`VcpuThread::join`] waits for that.
    pub(crate) fn leave(&self) {
        self.order(Order::Leave);
    }

    /// Waits until its thread is gone. One that does not come out until `deadline` is left behind, and said so.
    pub(crate) fn join(self, deadline: Instant) {
        loop {
            match self.next(deadline) {
                Ok(_) => {}
                Err(VcpuError::Silent(id)) => {
                    tracing::error!(vcpu = id.0, "vCPU thread did not end");
                    return;
                }
                Err(VcpuError::Gone(_) | VcpuError::Failed(..)) => break,
            }
        }
        // Its channel is gone, so it is about to end or has panicked; both were reported.
        let _ = self.thread.join();
    }

    /// Processor time it has used.
    pub(crate) fn time(&self) -> Duration {
        self.clock.get().map_or(Duration::ZERO, |clock| clock.read())
    }

    fn order(&self, order: Order) {
        // A thread that is gone takes no orders; whoever waits for it is told.
        let _ = self.orders.send(order);
        self.kicker.kick();
        self.thread.thread().unpark();
    }

    fn next(&self, deadline: Instant) -> Result<Report, VcpuError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.reports.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => VcpuError::Silent(self.id),
            RecvTimeoutError::Disconnected => VcpuError::Gone(self.id),
        })
    }
}

/// The thread's side of its channels.
struct Line {
    inbox: Receiver<Order>,
    outbox: Sender<Report>,
}

impl Line {
    fn report(&self, report: Report) {
        // Whoever does not listen any more has dropped the machine; the next order says so.
        let _ = self.outbox.send(report);
    }
}

/// What ended a stay in the guest.
enum Stay {
    /// Wait for the next order.
    Over,
    /// End the thread.
    Leave,
}

fn serve<S: Seat>(
    seat: S,
    entry: Option<<S::Arch as Arch>::BootRegs>,
    mut io: impl GuestIo,
    line: &Line,
    ending: &Ending,
) {
    let bound = seat.bind().and_then(|mut vcpu| {
        if let Some(entry) = &entry {
            vcpu.set_boot_regs(entry)?;
        }
        Ok(vcpu)
    });
    let mut vcpu = match bound {
        Ok(vcpu) => vcpu,
        Err(cause) => return line.report(Report::Failed(cause)),
    };
    line.report(Report::Ready);
    loop {
        match line.inbox.recv() {
            Ok(Order::Run) if ending.is_over() => {}
            Ok(Order::Run) => match stay(&mut vcpu, &mut io, line, ending) {
                Stay::Over => {}
                Stay::Leave => return,
            },
            Ok(Order::Pause(number)) => line.report(Report::Paused(number)),
            Ok(Order::Leave) | Err(_) => return,
        }
    }
}

/// Runs the guest until an order or the machine's end.
fn stay<V: Vcpu>(vcpu: &mut V, io: &mut dyn GuestIo, line: &Line, ending: &Ending) -> Stay {
    loop {
        match vcpu.run(io) {
            Ok(Exit::Kicked) => {}
            Ok(Exit::Idle { until }) => park(until),
            Ok(Exit::PowerOff) => ending.tell(End::PowerOff),
            Ok(Exit::Reset) => ending.tell(End::Reset),
            Ok(Exit::Crash(why)) => ending.tell(End::Crashed(why)),
            // No backend of ours leaves this to us yet; one that does needs the other threads told.
            Ok(Exit::CpuOn(request)) => ending.tell(End::Crashed(format!(
                "the hypervisor cannot start another vCPU: {request:?}"
            ))),
            Err(failed) => ending.tell(End::Crashed(failed.to_string())),
        }
        match line.inbox.try_recv() {
            Ok(Order::Pause(number)) => {
                line.report(Report::Paused(number));
                return Stay::Over;
            }
            Ok(Order::Leave) | Err(TryRecvError::Disconnected) => return Stay::Leave,
            Ok(Order::Run) | Err(TryRecvError::Empty) => {}
        }
        if ending.is_over() {
            return Stay::Over;
        }
    }
}

/// Rests until an order, an interrupt of the backend's controller (both unpark the thread) or `until`.
fn park(until: Option<Instant>) {
    match until {
        Some(until) => std::thread::park_timeout(until.saturating_duration_since(Instant::now())),
        None => std::thread::park(),
    }
}
