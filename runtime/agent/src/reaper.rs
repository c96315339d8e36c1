//! Ends of processes.
//!
//! As PID 1 the agent is the parent of every orphan of the guest. One thread collects all of them; those
//! that somebody watches are reported, exactly once each.
//!
//! **Invariant:** a watched process is not collected before it is watched. The processes of containers wait
//! for the agent before they run anything, and [`Reaper::watch`] comes before that.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use caisson_wire::agent::ExitStatus;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};

/// What is done with a process's end.
type Report = Box<dyn FnOnce(ExitStatus) + Send>;

/// The watched processes. Clones share them.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Shared>);

#[derive(Default)]
struct Shared {
    watches: Mutex<HashMap<i32, Watch>>,
    /// Counts the children started, so that the thread can wait for the next one when there is none.
    started: Mutex<u64>,
    more: Condvar,
}

/// A watched process.
struct Watch {
    report: Option<Report>,
    /// While this is set the end is kept rather than reported.
    held: bool,
    ended: Option<ExitStatus>,
}

impl std::fmt::Debug for Reaper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reaper").finish_non_exhaustive()
    }
}

impl Reaper {
    /// Watches a process; its end is held until [`Reaper::release`].
    pub(crate) fn watch(&self, pid: i32, report: impl FnOnce(ExitStatus) + Send + 'static) {
        let watch = Watch {
            report: Some(Box::new(report)),
            held: true,
            ended: None,
        };
        self.lock().insert(pid, watch);
    }

    /// Keeps the end of a process back, so that what is said in the meantime comes first.
    pub(crate) fn hold(&self, pid: i32) {
        if let Some(watch) = self.lock().get_mut(&pid) {
            watch.held = true;
        }
    }

    /// Reports the end of a process as soon as it has come, which may be now.
    pub(crate) fn release(&self, pid: i32) {
        let mut watches = self.lock();
        let Some(watch) = watches.get_mut(&pid) else {
            return;
        };
        watch.held = false;
        let Some(status) = watch.ended else { return };
        let report = watches.remove(&pid).and_then(|watch| watch.report);
        drop(watches); // the report may take its time
        if let Some(report) = report {
            report(status);
        }
    }

    /// Forgets a process: its end is nobody's business any more.
    pub(crate) fn forget(&self, pid: i32) {
        self.lock().remove(&pid);
    }

    /// Says that this process has a new child. Comes after the child exists.
    pub(crate) fn started(&self) {
        let mut started = self.0.started.lock().unwrap_or_else(PoisonError::into_inner);
        *started = started.wrapping_add(1);
        self.0.more.notify_all();
    }

    /// Starts the thread that collects this process's children, from now on all of them.
    ///
    /// # Errors
    /// Fails if there is no room for a thread.
    pub fn start(&self) -> std::io::Result<()> {
        let reaper = self.clone();
        crate::spawn("reaper", move || {
            loop {
                let before = *reaper.0.started.lock().unwrap_or_else(PoisonError::into_inner);
                match rustix::process::wait(WaitOptions::empty()) {
                    Ok(Some((pid, status))) => reaper.collected(pid.as_raw_nonzero().get(), status),
                    Ok(None) | Err(Errno::INTR) => {}
                    // No child at all. One more comes by our own doing only, which is counted.
                    Err(_) => {
                        let started = reaper.0.started.lock().unwrap_or_else(PoisonError::into_inner);
                        let same = |started: &mut u64| *started == before;
                        drop(reaper.0.more.wait_while(started, same));
                    }
                }
            }
        })
    }

    fn collected(&self, pid: i32, status: WaitStatus) {
        let Some(status) = decode(status) else { return };
        let mut watches = self.lock();
        let Some(watch) = watches.get_mut(&pid) else {
            return;
        };
        watch.ended = Some(status);
        if watch.held {
            return;
        }
        let report = watches.remove(&pid).and_then(|watch| watch.report);
        drop(watches);
        if let Some(report) = report {
            report(status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Watch>> {
        self.0.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn decode(status: WaitStatus) -> Option<ExitStatus> {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(ExitStatus::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX))),
        (None, Some(signal)) => Some(ExitStatus::Signal(signal)),
        (None, None) => None, // stopped or continued, which is not asked for
    }
}
