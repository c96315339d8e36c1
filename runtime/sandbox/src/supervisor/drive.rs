//! The loop around [`step`]: gathers events, and makes effects happen.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_net::Joined;
use caisson_wire::agent::{self, FROM_GUEST_LIMIT, FromAgent, TO_GUEST_LIMIT, Target};
use caisson_wire::vmm::{self, FromVmm};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{Instant, sleep_until};

use super::console::{self, BoundedLog};
use super::link::{Inbox, Link, Outbox};
use super::machine::{self, Launched, Vmm};
use super::share::Share;
use super::state::{ContainerFiles, Effect, Event, Phase, State, StreamUse, Timer, Token};
use super::step::step;
use super::{Failure, chain};
use crate::cgroup::Placed;
use crate::disk::{CONSOLE, ContainerRecord, Directory, SHARE, SandboxRecord, VMM_LOG};
use crate::id::ContainerId;
use crate::plan::{NetworkNamespace, SandboxPlan};
use crate::process::ProcessId;
use crate::proto::{Answer, FromStandIn, LIMIT, MachineFailure, Refusal, Reply, Request, SOCKET, ToStandIn};

/// Most events that wait; whoever sends more waits as well, so that a guest's flood stays in its own sockets.
const MOST_EVENTS: usize = 64;
/// Most connections of clients at once.
const MOST_CLIENTS: usize = 256;
/// How long the last answers may take to leave.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long the first request may take to come: hooks run before it, each with a limit of its own.
const FIRST_REQUEST: Duration = Duration::from_secs(3600);
/// Bytes mixed into the guest's entropy pool: what `getrandom` gives without interruption (getrandom(2)).
const ENTROPY: usize = 256;

/// What happened, with the descriptors that came with it.
struct Occurrence {
    event: Event,
    descriptors: Vec<OwnedFd>,
    /// Where the answer to a request goes.
    reply_to: Option<u64>,
}

/// Everything outside the state: sockets, processes, timers.
struct Drive {
    root: PathBuf,
    directory: Directory,
    events: mpsc::Sender<Occurrence>,
    record: SandboxRecord,
    /// What was last written of each container.
    written: HashMap<String, ContainerRecord>,
    share: Option<Share>,
    cgroup: Option<Placed>,
    vmm: Option<Vmm>,
    /// The interfaces at the machine's taps; they go back to their namespace with it.
    joined: Option<Joined>,
    to_vmm: Option<Outbox>,
    to_agent: Option<Outbox>,
    stand_ins: HashMap<Target, Outbox>,
    clients: HashMap<u64, Outbox>,
    /// Which client waits for which answer.
    tokens: HashMap<Token, u64>,
    timers: HashMap<Timer, Instant>,
    writers: Vec<JoinHandle<()>>,
    /// The descriptors that came with the event at hand.
    descriptors: Vec<OwnedFd>,
    last_client: u64,
    last_token: Token,
    finished: bool,
}

/// Serves a sandbox until its end.
pub(crate) async fn run(root: PathBuf, id: ContainerId, creator: OwnedFd) -> Result<(), Failure> {
    let directory = Directory::of(&root, &id);
    let (events, mut queue) = mpsc::channel(MOST_EVENTS);
    let record = SandboxRecord {
        id,
        supervisor: ProcessId::own()?,
        vmm: None,
        stand_ins: Vec::new(),
        cgroup: None,
        machine: None,
        failure: None,
        call_deadline: Duration::ZERO,
    };
    directory.write_sandbox(&record)?;
    let mut drive = Drive {
        root,
        directory,
        events,
        record,
        written: HashMap::new(),
        share: None,
        cgroup: None,
        vmm: None,
        joined: None,
        to_vmm: None,
        to_agent: None,
        stand_ins: HashMap::new(),
        clients: HashMap::new(),
        tokens: HashMap::new(),
        timers: HashMap::new(),
        writers: Vec::new(),
        descriptors: Vec::new(),
        last_client: 0,
        last_token: 0,
        finished: false,
    };
    let listener = drive.listen()?;
    drive.serve_client(creator)?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut state = State::default();
    let first = Instant::now() + FIRST_REQUEST;

    while !drive.finished {
        let deadline = drive.next_deadline();
        let idle = state.phase == Phase::Idle;
        let wake = deadline.as_ref().map_or(first, |(at, _)| *at);
        let occurrence = tokio::select! {
            // In no fixed order: a guest that floods the queue must not keep deadlines and clients waiting.
            Some(occurrence) = queue.recv() => occurrence,
            _ = terminate.recv() => Occurrence::plain(Event::Terminated),
            () = sleep_until(wake), if deadline.is_some() || idle => match deadline {
                Some((_, timer)) => {
                    drive.timers.remove(&timer);
                    Occurrence::plain(Event::Deadline(timer))
                }
                None => Occurrence::plain(Event::Terminated),
            },
            accepted = listener.accept() => {
                match accepted {
                    Ok((stream, _)) => drive.accept(stream),
                    Err(err) => {
                        tracing::warn!(error = %err, "could not accept a client");
                        // Out of descriptors, most likely: without a pause this would spin.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
                continue;
            }
        };
        state = drive.take(state, occurrence);
        if idle && drive.clients.is_empty() && state.phase == Phase::Idle {
            break; // whoever started us has gone without a request
        }
    }
    drop(listener);
    drive.farewell().await;
    Ok(())
}

impl Occurrence {
    fn plain(event: Event) -> Self {
        Self {
            event,
            descriptors: Vec::new(),
            reply_to: None,
        }
    }
}

impl Drive {
    /// One event, and everything that follows from it.
    fn take(&mut self, mut state: State, occurrence: Occurrence) -> State {
        let Occurrence {
            event,
            descriptors,
            reply_to,
        } = occurrence;
        self.descriptors = descriptors;
        let mut events = vec![match (event, reply_to) {
            (Event::Request(_, request), Some(client)) => {
                self.last_token += 1;
                self.tokens.insert(self.last_token, client);
                Event::Request(self.last_token, request)
            }
            (Event::Dropped(client), Some(_)) => return self.client_gone(state, client),
            (event, _) => event,
        }];
        while let Some(event) = events.pop() {
            let effects;
            (state, effects) = step(state, event);
            for effect in effects {
                // Only starting things has an outcome at once, and nothing follows it in the same list.
                events.extend(self.perform(&state, effect));
            }
        }
        self.descriptors.clear();
        state
    }

    fn client_gone(&mut self, mut state: State, client: u64) -> State {
        self.clients.remove(&client);
        let tokens: Vec<Token> = self
            .tokens
            .iter()
            .filter_map(|(token, of)| (*of == client).then_some(*token))
            .collect();
        for token in tokens {
            self.tokens.remove(&token);
            state = self.take(state, Occurrence::plain(Event::Dropped(token)));
        }
        state
    }

    fn perform(&mut self, state: &State, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Persist => self.persist(state),
            Effect::Answer(token, answer) => self.answer(token, &answer),
            Effect::Adopt(_, target) => self.adopt(state, target),
            Effect::ToStandIn(target, message) => self.tell_stand_in(&target, &message, Vec::new()),
            Effect::Release(target) => drop(self.stand_ins.remove(&target)),
            Effect::Launch(plan) => return Some(Event::Launched(self.launch(state, &plan))),
            Effect::Prepare(container) => {
                let outcome = self.prepare(state, &container);
                return Some(Event::Prepared(container, outcome));
            }
            Effect::Unprepare(ContainerFiles(targets)) => {
                if let Some(share) = &self.share {
                    share.unbind_all(targets.iter().map(String::as_str));
                }
            }
            Effect::ToVmm(message) => {
                if self
                    .to_vmm
                    .as_ref()
                    .is_some_and(|vmm| vmm.send(&message).is_err())
                {
                    return Some(Event::VmmGone(
                        "the vmm process takes no messages any more".to_owned(),
                    ));
                }
            }
            Effect::ToAgent(request) => return self.tell_agent(request),
            Effect::Stream(use_of) => self.use_stream(use_of),
            Effect::Arm(timer, after) => drop(self.timers.insert(timer, Instant::now() + after)),
            Effect::Disarm(timer) => drop(self.timers.remove(&timer)),
            Effect::KillVmm => {
                self.to_vmm = None;
                self.to_agent = None;
                self.vmm = None;
                self.joined = None;
            }
            Effect::Finish => self.finished = true,
        }
        None
    }

    fn answer(&mut self, token: Token, answer: &Answer) {
        let client = match answer {
            // A watcher gets several of these.
            Ok(Reply::OutOfMemory) => self.tokens.get(&token).copied(),
            _ => self.tokens.remove(&token),
        };
        let Some(client) = client.and_then(|client| self.clients.get(&client)) else {
            return;
        };
        if client.send(answer).is_err() {
            tracing::debug!("a client takes no answers any more");
        }
    }

    fn persist(&mut self, state: &State) {
        self.record.vmm = self.vmm.as_ref().map(|vmm| vmm.id);
        self.record.stand_ins = state.stand_ins();
        self.record.machine.clone_from(&state.machine);
        self.record.call_deadline = state.call_deadline;
        self.record.failure = state.failure.as_ref().map(ToString::to_string);
        if let Err(err) = self.directory.write_sandbox(&self.record) {
            tracing::error!(error = chain(&err), "could not write the sandbox's state");
        }
        for (id, container) in &state.containers {
            let Ok(id) = ContainerId::try_from(id.as_str()) else {
                continue; // a client of ours sent it, so it is one
            };
            let directory = Directory::of(&self.root, &id);
            let before = match self.written.get(id.as_str()) {
                Some(before) => before.clone(),
                None => match directory.read_container() {
                    Ok(before) => before,
                    Err(err) => {
                        tracing::error!(error = chain(&err), "could not read a container's state");
                        continue;
                    }
                },
            };
            let creating = container.status == crate::Status::Creating;
            let record = ContainerRecord {
                status: container.status,
                creator: before.creator.filter(|_| creating),
                stand_in: container.init.stand_in,
                exit: container.exit,
                failure: container.failure.clone(),
                ..before.clone()
            };
            if record != before
                && let Err(err) = directory.write_container(&record)
            {
                tracing::error!(error = chain(&err), "could not write a container's state");
            }
            self.written.insert(id.into(), record);
        }
        self.written.retain(|id, _| state.containers.contains_key(id));
    }

    fn adopt(&mut self, state: &State, target: Target) {
        let Some(socket) = self.descriptors.pop() else {
            // A request of ours carries it; without one the stand-in counts as gone.
            self.post(Event::StandInGone(target));
            return;
        };
        if let (Some(cgroup), Some(container)) = (&self.cgroup, state.containers.get(&target.container)) {
            let process = match &target.exec {
                None => container.init.stand_in,
                Some(exec) => container.execs.get(exec).and_then(|process| process.stand_in),
            };
            let outcome = process.map_or(Ok(()), |process| cgroup.add(process.pid));
            if let Err(err) = outcome {
                tracing::warn!(error = chain(&err), "could not place a stand-in into the cgroup");
            }
        }
        match Link::new(socket) {
            Ok(link) => {
                let (outbox, inbox, writer) = link.split((LIMIT, LIMIT), 0);
                self.writers.push(writer);
                self.stand_ins.insert(target.clone(), outbox);
                spawn_local(follow_stand_in(inbox, target, self.events.clone()));
            }
            Err(err) => {
                tracing::error!(error = %err, "could not serve a stand-in");
                self.post(Event::StandInGone(target));
            }
        }
    }

    fn tell_stand_in(&self, target: &Target, message: &ToStandIn, descriptors: Vec<OwnedFd>) {
        let stand_in = self.stand_ins.get(target);
        if stand_in.is_some_and(|outbox| outbox.send_with(message, descriptors).is_err()) {
            tracing::debug!("a stand-in takes no messages any more");
        }
    }

    fn tell_agent(&self, mut request: agent::Request) -> Option<Event> {
        if let agent::Call::Setup(setup) = &mut request.call {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            setup.version = caisson_wire::VERSION;
            setup.time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            setup.entropy = vec![0; ENTROPY];
            setup.share = true;
            if let Err(err) =
                rustix::rand::getrandom(&mut setup.entropy, rustix::rand::GetRandomFlags::empty())
            {
                tracing::error!(error = %err, "could not read random bytes for the guest");
                setup.entropy.clear();
            }
        }
        let agent = self.to_agent.as_ref()?;
        match agent.send(&request) {
            Ok(()) => None,
            Err(_) => Some(Event::AgentGone(
                "its agent takes no requests any more".to_owned(),
            )),
        }
    }

    fn use_stream(&mut self, use_of: StreamUse) {
        let Some(socket) = self.descriptors.pop() else {
            return; // the vmm process kept it back, and whoever waits for it has a deadline
        };
        match use_of {
            StreamUse::Drop => drop(socket),
            StreamUse::StandIn(target, stream) => {
                self.tell_stand_in(&target, &ToStandIn::Stream(stream), vec![socket]);
            }
            StreamUse::Agent => match Link::new(socket) {
                Ok(link) => {
                    let (outbox, inbox, _) = link.split((TO_GUEST_LIMIT, FROM_GUEST_LIMIT), 0);
                    self.to_agent = Some(outbox);
                    spawn_local(follow_agent(inbox, self.events.clone()));
                }
                Err(err) => self.post(Event::AgentGone(format!("cannot use its stream: {err}"))),
            },
        }
    }

    fn prepare(&self, state: &State, id: &str) -> Result<(), Refusal> {
        let failed = |err: &dyn std::error::Error| Refusal::Host {
            stage: "share the container's files".to_owned(),
            cause: chain(err),
        };
        match (&self.share, state.containers.get(id)) {
            (Some(share), Some(container)) => {
                share.bind_all(&container.plan.binds).map_err(|err| failed(&err))
            }
            _ => Err(Refusal::Unknown(id.to_owned())),
        }
    }

    fn launch(&mut self, state: &State, plan: &SandboxPlan) -> Result<super::state::Network, MachineFailure> {
        let failure = |stage: &str, err: &dyn std::error::Error| MachineFailure {
            stage: stage.to_owned(),
            cause: chain(err),
            console: String::new(),
        };
        self.place(state, plan)
            .map_err(|err| failure("set the host cgroup up", &err))?;
        let share = Share::create(&self.directory.path().join(SHARE))
            .map_err(|err| failure("make the shared directory", &err))?;
        let share = self.share.insert(share);
        let first = state.containers.values().next();
        if let Some(container) = first {
            share
                .bind_all(&container.plan.binds)
                .map_err(|err| failure("share the container's files", &err))?;
        }
        // The stand-in lives in the container's network namespace, even in one that has no name.
        let netns = first.and_then(|container| match container.plan.netns {
            NetworkNamespace::Caller => plan.netns.clone(),
            _ => {
                let stand_in = container.init.stand_in?;
                Some(format!("/proc/{}/ns/net", stand_in.pid).into())
            }
        });
        let Launched {
            vmm,
            socket,
            message,
            descriptors,
            console,
            network,
            joined,
            said,
        } = machine::launch(plan, share, netns.as_deref())?;
        let log = BoundedLog::new(&self.directory, CONSOLE);
        let printed = spawn_local(console::follow(console, log, self.events_of(Event::Console)));
        let log = BoundedLog::new(&self.directory, VMM_LOG);
        let said = spawn_local(console::follow(said, log, self.events_of(Event::VmmSaid)));
        let pidfd = vmm
            .pidfd()
            .map_err(|err| failure("watch the vmm process", &err))?;
        self.vmm = Some(vmm);
        self.joined = joined;
        let start = || -> io::Result<(Outbox, Inbox)> {
            spawn_local(follow_end(pidfd, [printed, said], self.events.clone()));
            let (outbox, inbox, _) = Link::new(socket)?.split((vmm::LIMIT, vmm::LIMIT), MOST_VMM_DESCRIPTORS);
            outbox
                .send_with(&message, descriptors)
                .map_err(io::Error::other)?;
            Ok((outbox, inbox))
        };
        let (outbox, inbox) = start().map_err(|err| failure("launch the machine", &err))?;
        self.to_vmm = Some(outbox);
        spawn_local(follow_vmm(inbox, self.events.clone()));
        Ok(network)
    }

    /// Puts this process, and so the vmm process later, and the stand-ins into the host cgroup.
    fn place(&mut self, state: &State, plan: &SandboxPlan) -> Result<(), crate::CgroupError> {
        let Some(cgroup) = &plan.cgroup else {
            return Ok(());
        };
        let placed = Placed::plan(cgroup)?;
        self.record.cgroup = Some(placed.clone());
        // Written down before anything is made, so that a crash here leaves nothing unknown.
        self.persist(state);
        let mut usable = placed;
        usable.create(cgroup)?;
        usable.add(self.record.supervisor.pid)?;
        for stand_in in state.stand_ins() {
            usable.add(stand_in.pid)?;
        }
        self.cgroup = Some(usable);
        Ok(())
    }

    fn next_deadline(&self) -> Option<(Instant, Timer)> {
        self.timers
            .iter()
            .min_by_key(|(_, at)| **at)
            .map(|(timer, at)| (*at, timer.clone()))
    }

    fn listen(&self) -> io::Result<UnixListener> {
        let socket = control_socket(&self.directory)?;
        let listener = std::os::unix::net::UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    }

    fn accept(&mut self, stream: UnixStream) {
        let own = rustix::process::getuid();
        let trusted =
            sockopt::socket_peercred(&stream).is_ok_and(|peer| peer.uid == own || peer.uid.is_root());
        if !trusted || self.clients.len() >= MOST_CLIENTS {
            tracing::warn!(trusted, clients = self.clients.len(), "refused a client");
            return;
        }
        let served = stream
            .into_std()
            .and_then(|stream| self.serve_client(stream.into()));
        if let Err(err) = served {
            tracing::warn!(error = %err, "could not serve a client");
        }
    }

    fn serve_client(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.last_client += 1;
        let client = self.last_client;
        let (outbox, inbox, writer) = Link::new(socket)?.split((LIMIT, LIMIT), 2);
        self.writers.retain(|writer| !writer.is_finished());
        self.writers.push(writer);
        self.clients.insert(client, outbox);
        spawn_local(follow_client(inbox, client, self.events.clone()));
        Ok(())
    }

    /// Makes events of what comes from a pipe.
    fn events_of(&self, event: fn(Vec<u8>) -> Event) -> impl AsyncFnMut(Vec<u8>) + use<> {
        let events = self.events.clone();
        async move |bytes| {
            // Whoever is gone needs no event.
            let _ = events.send(Occurrence::plain(event(bytes))).await;
        }
    }

    /// An event that arises here, behind those that wait.
    fn post(&self, event: Event) {
        let events = self.events.clone();
        spawn_local(async move {
            // Whoever is gone needs no event.
            let _ = events.send(Occurrence::plain(event)).await;
        });
    }

    /// Lets the last answers leave.
    async fn farewell(mut self) {
        self.clients.clear();
        self.stand_ins.clear();
        let all = async {
            for writer in std::mem::take(&mut self.writers) {
                let _ = writer.await; // a writer does not panic, and nobody cancels it
            }
        };
        if tokio::time::timeout(FAREWELL, all).await.is_err() {
            tracing::debug!("somebody did not take the last answer");
        }
    }
}

/// One stream's descriptor comes with a message of the vmm process; room for a few in flight.
const MOST_VMM_DESCRIPTORS: usize = 8;

/// Binds the control socket: mode 0600 in a directory of mode 0700.
fn control_socket(directory: &Directory) -> io::Result<OwnedFd> {
    use rustix::net::{bind, listen, socket_with};
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    crate::client::with_address(directory.path(), |address| Ok(bind(&socket, address)?))?;
    std::fs::set_permissions(
        directory.path().join(SOCKET),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )?;
    listen(&socket, 64)?;
    Ok(socket)
}

async fn follow_client(mut inbox: Inbox, client: u64, events: mpsc::Sender<Occurrence>) {
    while let Ok((request, descriptors)) = inbox.recv::<Request>().await {
        let occurrence = Occurrence {
            event: Event::Request(0, request),
            descriptors,
            reply_to: Some(client),
        };
        if events.send(occurrence).await.is_err() {
            return;
        }
    }
    let gone = Occurrence {
        event: Event::Dropped(client),
        descriptors: Vec::new(),
        reply_to: Some(client),
    };
    // Whoever is gone needs no event.
    let _ = events.send(gone).await;
}

async fn follow_stand_in(mut inbox: Inbox, target: Target, events: mpsc::Sender<Occurrence>) {
    while let Ok((message, _)) = inbox.recv::<FromStandIn>().await {
        let event = Event::StandIn(target.clone(), message);
        if events.send(Occurrence::plain(event)).await.is_err() {
            return;
        }
    }
    // Whoever is gone needs no event.
    let _ = events.send(Occurrence::plain(Event::StandInGone(target))).await;
}

async fn follow_agent(mut inbox: Inbox, events: mpsc::Sender<Occurrence>) {
    let why = loop {
        match inbox.recv::<FromAgent>().await {
            Ok((message, _)) => {
                if events
                    .send(Occurrence::plain(Event::Agent(message)))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(caisson_wire::RecvError::Closed) => break "its agent has ended".to_owned(),
            Err(err) => break format!("its agent's stream broke: {}", chain(&err)),
        }
    };
    let _ = events.send(Occurrence::plain(Event::AgentGone(why))).await;
}

async fn follow_vmm(mut inbox: Inbox, events: mpsc::Sender<Occurrence>) {
    let why = loop {
        match inbox.recv::<FromVmm>().await {
            Ok((message, descriptors)) => {
                let occurrence = Occurrence {
                    event: Event::Vmm(message),
                    descriptors,
                    reply_to: None,
                };
                if events.send(occurrence).await.is_err() {
                    return;
                }
            }
            // How the process ended says more than that its socket did.
            Err(caisson_wire::RecvError::Closed | caisson_wire::RecvError::Socket(_)) => return,
            Err(err) => break format!("the vmm process sent no message of ours: {}", chain(&err)),
        }
    };
    tokio::time::sleep(LAST_WORDS).await;
    let _ = events.send(Occurrence::plain(Event::VmmGone(why))).await;
}

/// Reports the end of the vmm process, after what it may have said last.
async fn follow_end(pidfd: OwnedFd, outputs: [JoinHandle<()>; 2], events: mpsc::Sender<Occurrence>) {
    let ended = async {
        let pidfd = crate::sys::watch(pidfd, tokio::io::Interest::READABLE)?;
        let _ended = pidfd.readable().await?;
        Ok::<_, io::Error>(machine::how_it_ended(pidfd.get_ref()))
    };
    let why = match ended.await {
        Ok(how) => how,
        Err(err) => format!("the vmm process cannot be watched: {err}"),
    };
    let read = async {
        for output in outputs {
            let _ = output.await; // a reader does not panic, and nobody cancels it
        }
    };
    // Its last message and its output end with it; only a descriptor that it gave away could keep one open.
    if tokio::time::timeout(LAST_OUTPUT, read).await.is_err() {
        tracing::debug!("the vmm process's output did not end with it");
    }
    tokio::time::sleep(LAST_WORDS).await;
    let _ = events.send(Occurrence::plain(Event::VmmGone(why))).await;
}

/// How long the output of a vmm process that has ended may take to be read.
const LAST_OUTPUT: Duration = Duration::from_millis(250);
/// How long what it wrote last may take to be read.
const LAST_WORDS: Duration = Duration::from_millis(50);
