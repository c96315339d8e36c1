//! The vmm process: one machine, one supervisor to report to.
//!
//! It is born with one socket, gets one message with every descriptor, builds the machine, gives up everything
//! else, lets the guest run, and from then on reports and obeys. It ends with its machine, and with its
//! supervisor; as the first process of its PID namespace it takes whatever it started with it.

mod reports;

use std::error::Error;
use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver as Queue, Sender as Tell, channel as queue, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use caisson_devices::thread::Threads;
use caisson_wire::vmm::{Answer, Confine, End, FromVmm, LIMIT, Launch, Order, ToVmm};
use caisson_wire::{Receiver, RecvError, channel};

use crate::confine::{Confinement, Filters, Thread, raise_descriptor_limit, sys};
use crate::{Build, BuildError, Console, Descriptors, Machine, Setup};
use reports::{Ports, Reports};

/// Where the process finds its control socket.
const SOCKET: RawFd = 3;
/// How long the launch message may take to come. The supervisor sends it at once.
const LAUNCH_LIMIT: Duration = Duration::from_secs(30);
/// Connections of the guest that wait to be reported; more are refused.
const WAITING_CONNECTIONS: usize = 128;

type Shared = Arc<Mutex<Box<dyn Machine>>>;

/// Runs the vmm process to its end. `arguments` are for whoever lists processes: the sandbox's id.
///
/// For a process with one thread, whose descriptor 3 is its supervisor's socket. What it logs through
/// `tracing` should go to standard error.
pub fn main(_arguments: &[OsString], build: Build) -> ExitCode {
    let socket = match sys::inherited(SOCKET) {
        Ok(socket) => socket,
        Err(err) => {
            tracing::error!(error = %err, "no socket at descriptor 3; this process is for a supervisor to start");
            return ExitCode::FAILURE;
        }
    };
    end_with_any_thread();
    match serve(socket, build) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            tracing::error!(error = %chain(&err), "the vmm process cannot serve its supervisor");
            ExitCode::FAILURE
        }
    }
}

/// A thread that panics is a broken machine: nothing of it may go on.
fn end_with_any_thread() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(PANICKED);
    }));
}

/// Exit code after a panic, as the standard library has it.
const PANICKED: i32 = 101;

/// What the supervisor cannot be told.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("cannot use the control socket")]
    Socket(#[source] std::io::Error),
    #[error("the supervisor sent no launch message")]
    Launch(#[source] RecvError),
    #[error("the supervisor began with another message than a launch")]
    NoLaunch,
}

fn serve(socket: OwnedFd, build: Build) -> Result<(), ServeError> {
    let (sender, mut orders) = channel(socket, LIMIT).map_err(ServeError::Socket)?;
    let reports = Reports::new(sender).map_err(ServeError::Socket)?;
    orders
        .set_timeout(Some(LAUNCH_LIMIT))
        .map_err(ServeError::Socket)?;
    let (launch, descriptors) = match orders.recv() {
        Ok((ToVmm::Launch(launch), descriptors)) => (launch, descriptors),
        Ok(_) => return Err(ServeError::NoLaunch),
        // Another version's message may be one that this one cannot read.
        Err(err @ RecvError::Decode(_)) => {
            reports.ended(refused("read the launch message", &err), String::new());
            return Ok(());
        }
        Err(err) => return Err(ServeError::Launch(err)),
    };
    let began = Instant::now();
    orders.set_timeout(None).map_err(ServeError::Socket)?;
    let (ended, ends) = queue();
    let console = match run(*launch, descriptors, build, began, orders, &reports, ended) {
        Ok(console) => console,
        Err((console, err)) => {
            reports.ended(refused(err.stage, &*err.source), console.tail());
            return Ok(());
        }
    };
    // The queue has a sender for as long as the process obeys orders, which is until it exits.
    let end = ends
        .recv()
        .unwrap_or_else(|_| End::Crashed("nobody serves the machine any more".to_owned()));
    reports.ended(end, console.tail());
    Ok(())
}

/// Builds the machine, confines the process, and starts all that serves it.
fn run(
    launch: Launch,
    descriptors: Vec<OwnedFd>,
    build: Build,
    began: Instant,
    orders: Receiver,
    reports: &Reports,
    ended: Tell<End>,
) -> Result<Console, (Console, BuildError)> {
    let no_console = |err| (Console::new(None), err);
    let Prepared {
        launch,
        share,
        mut descriptors,
        confinement,
    } = prepare(launch, descriptors).map_err(no_console)?;
    let console = console(&launch, &mut descriptors).map_err(no_console)?;
    let started = (|| {
        let filters = confinement.as_ref().map(Confinement::filters);
        let of_threads = filters.clone();
        let (threads, starter) = Threads::through_starter(move |role| {
            if let Some(filters) = &of_threads {
                filters.enter(Thread::Serving(role));
            }
        });
        let (connected, connections) = sync_channel(WAITING_CONNECTIONS);
        let machine = build(Setup {
            launch,
            descriptors,
            console: console.clone(),
            ports: Arc::new(Ports::new(connected)),
            threads,
            ended: ended.clone(),
        })?;
        if let Some(confinement) = confinement {
            confinement.enter(share.as_ref().map(OwnedFd::as_fd))?;
        }
        let machine: Shared = Arc::new(Mutex::new(machine));
        starter.open();
        let (go, gone) = queue();
        // These come from this thread, which must start none once it has its filter.
        spawn("starter", Thread::Starter, &filters, move || starter.run())?;
        let (to, of) = (reports.clone(), Arc::clone(&machine));
        spawn("orders", Thread::Control, &filters, move || {
            obey(orders, &to, &of, &ended);
        })?;
        let to = reports.clone();
        spawn("connections", Thread::Control, &filters, move || {
            if gone.recv().is_ok() {
                reports::connections(&connections, &to);
            }
        })?;
        if let Some(filters) = &filters {
            filters.enter(Thread::Control);
        }
        let mut started = machine.lock().unwrap_or_else(PoisonError::into_inner);
        started.start()?;
        let built_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        reports.tell(&FromVmm::Started {
            machine: started.name().to_owned(),
            built_us,
        });
        drop(started);
        // The guest's connections are news only after it.
        let _ = go.send(());
        Ok(())
    })();
    match started {
        Ok(()) => Ok(console),
        Err(err) => Err((console, err)),
    }
}

struct Prepared {
    launch: Launch,
    share: Option<OwnedFd>,
    descriptors: Descriptors,
    confinement: Option<Confinement>,
}

fn prepare(launch: Launch, descriptors: Vec<OwnedFd>) -> Result<Prepared, BuildError> {
    if launch.version != caisson_wire::VERSION {
        let why = format!(
            "the supervisor speaks version {}, this process version {}; restart the sandbox with one build",
            launch.version,
            caisson_wire::VERSION
        );
        return Err(BuildError::new("read the launch message", why));
    }
    raise_descriptor_limit();
    // The file server gives files the modes that the guest asks for, and answers for a full host itself.
    rustix::process::umask(rustix::fs::Mode::empty());
    sys::ignore_file_size_signal();
    let share = launch
        .share
        .and_then(|share| descriptors.get(share.0 as usize))
        .map(OwnedFd::try_clone)
        .transpose()
        .map_err(|err| BuildError::new("keep the shared directory", err))?;
    let confinement = match launch.confine {
        Confine::Full => Some(Confinement::prepare()?),
        Confine::Off => None,
    };
    Ok(Prepared {
        launch,
        share,
        descriptors: Descriptors::new(descriptors),
        confinement,
    })
}

/// The console; its copy is made non-blocking.
fn console(launch: &Launch, descriptors: &mut Descriptors) -> Result<Console, BuildError> {
    const STAGE: &str = "open the console";
    let copy = launch.console.map(|fd| descriptors.take(fd, STAGE)).transpose()?;
    if let Some(copy) = &copy {
        let set = rustix::fs::fcntl_getfl(copy)
            .and_then(|flags| rustix::fs::fcntl_setfl(copy, flags | rustix::fs::OFlags::NONBLOCK));
        set.map_err(|err| BuildError::new(STAGE, err))?;
    }
    Ok(Console::new(copy))
}

fn spawn(
    name: &str,
    thread: Thread,
    filters: &Option<Filters>,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), BuildError> {
    let filters = filters.clone();
    let spawned = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(move || {
            if let Some(filters) = &filters {
                filters.enter(thread);
            }
            body();
        });
    spawned
        .map(drop)
        .map_err(|err| BuildError::new("start the process's own threads", err))
}

/// Stack of the process's own threads: they encode and decode small messages.
const STACK: usize = 256 * 1024;

/// Carries orders out until the machine is to end, or the supervisor has gone: then the process ends at once.
fn obey(mut orders: Receiver, reports: &Reports, machine: &Shared, ended: &Tell<End>) {
    loop {
        match orders.recv::<ToVmm>() {
            Ok((ToVmm::Ask { id, order }, _)) => {
                let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
                let outcome = carry_out(order, &mut **machine).map_err(|err| chain(&err));
                drop(machine);
                reports.tell(&FromVmm::Answer { id, outcome });
            }
            Ok((ToVmm::Shutdown, _)) => {
                // Whoever waits for the end has gone only if it has come.
                let _ = ended.send(End::Stopped);
            }
            Ok((ToVmm::Launch(_), _)) => {
                tracing::error!("the supervisor launched a second machine");
                std::process::exit(1);
            }
            Err(err) => {
                if !matches!(err, RecvError::Closed) {
                    tracing::error!(error = %chain(&err), "the supervisor's socket is broken");
                }
                std::process::exit(1);
            }
        }
    }
}

fn carry_out(order: Order, machine: &mut dyn Machine) -> Result<Answer, BuildError> {
    match order {
        Order::Pause => machine.pause().map(|()| Answer::Done),
        Order::Resume => machine.resume().map(|()| Answer::Done),
        Order::Usage => Ok(Answer::Usage(machine.usage())),
    }
}

fn refused(stage: &str, cause: &(dyn Error + 'static)) -> End {
    End::Refused {
        stage: stage.to_owned(),
        cause: chain(cause),
    }
}

/// An error and what is behind it, joined by colons.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Waits on a queue, for [`reports`].
type Connections = Queue<(u32, std::os::unix::net::UnixStream)>;
