//! Requests from clients.

use caisson_wire::agent::{self, Target};

use super::super::state::{Container, Effect, Phase, Process, State, Timer, Token, What};
use super::{KILL, answer};
use crate::proto::{CreateRequest, ExecRequest, Refusal, Reply, Request, Status, Stream, Wanted};

/// Most containers of one sandbox, and most processes of one container. A pod has a few; each costs memory here.
const MOST: usize = 1024;

impl State {
    pub(super) fn request(&mut self, token: Token, request: Request, out: &mut Vec<Effect>) {
        let refusal = match request {
            Request::Create(request) => self.create(token, *request, out),
            Request::Delete { container, force } => self.delete(token, &container, force, out),
            Request::Wait { container } => self.wait(token, &container, out),
            Request::Watch { container } => self.watch(token, &container),
            _ if matches!(self.phase, Phase::Flushing | Phase::Stopping) => Err(Refusal::Ending),
            Request::Start { container } => self.start(token, container, out),
            Request::Exec(request) => self.exec(token, *request, out),
            Request::Signal {
                container,
                signal,
                all,
            } => self.signal_request(token, container, (signal, all), out),
            Request::Pause { container } => self.on(&container, &[Status::Running]).map(|()| {
                let call = agent::Call::Pause {
                    container: container.clone(),
                };
                self.call(What::Pause(container), call, Some(token), out);
            }),
            Request::Resume { container } => self.on(&container, &[Status::Paused]).map(|()| {
                let call = agent::Call::Resume {
                    container: container.clone(),
                };
                self.call(What::Resume(container), call, Some(token), out);
            }),
            Request::Update { container, resources } => self.on(&container, &ALIVE).map(|()| {
                let call = agent::Call::Update { container, resources };
                self.call(What::Update, call, Some(token), out);
            }),
            Request::Processes { container } => self.on(&container, &ALIVE).map(|()| {
                self.call(
                    What::Processes,
                    agent::Call::Processes { container },
                    Some(token),
                    out,
                );
            }),
            Request::Stats { container } => self.on(&container, &ALIVE).map(|()| {
                self.call(What::Stats, agent::Call::Stats { container }, Some(token), out);
            }),
        };
        if let Err(refusal) = refusal {
            out.push(Effect::Answer(token, Err(refusal)));
        }
    }

    /// Whoever asked has gone: what was asked is taken back if it is under way.
    pub(super) fn dropped(&mut self, token: Token, out: &mut Vec<Effect>) {
        for container in self.containers.values_mut() {
            container.waiters.retain(|waiter| *waiter != token);
            container.watchers.retain(|watcher| *watcher != token);
        }
        let creating = self
            .containers
            .iter()
            .find(|(_, container)| container.creating == Some(token));
        if let Some(id) = creating.map(|(id, _)| id.clone()) {
            self.abandon(&id, out);
        }
    }

    /// Ends a container that nobody waits for: with its sandbox if it is alone in it.
    fn abandon(&mut self, id: &str, out: &mut Vec<Effect>) {
        if self.containers.len() == 1 || self.phase != Phase::Ready {
            self.terminated(out);
        } else if let Some(container) = self.containers.get_mut(id) {
            container.creating = None;
            self.signal(init_of(id), KILL, true, None, out);
            self.remove(id, None, out);
        }
    }

    fn create(&mut self, token: Token, request: CreateRequest, out: &mut Vec<Effect>) -> Result<(), Refusal> {
        let id = request.container.id.clone();
        match (self.phase, &request.sandbox) {
            (Phase::Idle, Some(_)) | (Phase::Ready, None) => {}
            (Phase::Flushing | Phase::Stopping, _) => return Err(Refusal::Ending),
            (_, Some(_)) => return Err(Refusal::Request("this sandbox has a plan already".to_owned())),
            (_, None) => return Err(Refusal::Request("this sandbox is not up yet".to_owned())),
        }
        if self.containers.contains_key(&id) {
            return Err(Refusal::Exists(id));
        }
        if self.containers.len() >= MOST {
            return Err(Refusal::Request(format!(
                "a sandbox holds at most {MOST} containers"
            )));
        }
        out.push(Effect::Adopt(token, init_of(&id)));
        self.containers.insert(
            id.clone(),
            Container {
                plan: request.container,
                status: Status::Creating,
                exit: None,
                failure: None,
                out_of_memory: false,
                wanted: request.wanted,
                creating: Some(token),
                start: request.start,
                waiters: Vec::new(),
                watchers: Vec::new(),
                deleting: None,
                init: Process {
                    stand_in: Some(request.stand_in),
                    attached: true,
                    exit: None,
                },
                execs: std::collections::BTreeMap::new(),
            },
        );
        out.push(Effect::Persist);
        match request.sandbox {
            Some(plan) => {
                self.phase = Phase::Launching;
                self.call_deadline = plan.call_deadline;
                self.setup = plan.setup.clone();
                out.push(Effect::Arm(Timer::Boot, plan.boot_deadline));
                out.push(Effect::Launch(plan));
            }
            None => out.push(Effect::Prepare(id)),
        }
        Ok(())
    }

    pub(super) fn prepared(&mut self, id: &str, outcome: Result<(), Refusal>, out: &mut Vec<Effect>) {
        match outcome {
            Ok(()) if self.phase == Phase::Ready => self.send_create(id, out),
            Ok(()) => {}
            Err(refusal) => self.creation_failed(id, refusal, out),
        }
    }

    /// Asks the agent for a container, and for its start as well if that was asked for.
    pub(super) fn send_create(&mut self, id: &str, out: &mut Vec<Effect>) {
        let Some(container) = self.containers.get(id) else {
            return; // it was given up meanwhile
        };
        let (mut create, start, wanted) = (container.plan.create.clone(), container.start, container.wanted);
        create.container = id.to_owned();
        create.stdio = self.open_ports(&init_of(id), wanted);
        self.call(
            What::Create(id.to_owned()),
            agent::Call::Create(Box::new(create)),
            None,
            out,
        );
        if start {
            // In flight right behind: the agent carries out requests about one container in order.
            let call = agent::Call::Start {
                container: id.to_owned(),
            };
            self.call(What::Start(id.to_owned()), call, None, out);
        }
    }

    /// Gives each wanted stream a port that the guest may connect to once.
    fn open_ports(&mut self, target: &Target, wanted: Wanted) -> agent::Stdio {
        let mut port = |stream| {
            self.last_port = self.last_port.max(agent::FIRST_STREAM_PORT - 1).saturating_add(1);
            self.ports.insert(self.last_port, (target.clone(), stream));
            self.last_port
        };
        agent::Stdio {
            stdin: wanted.stdin.then(|| port(Stream::Stdin)),
            stdout: wanted.stdout.then(|| port(Stream::Stdout)),
            stderr: wanted.stderr.then(|| port(Stream::Stderr)),
            terminal: wanted.terminal.map(|size| agent::Terminal {
                port: port(Stream::Terminal),
                size,
            }),
        }
    }

    fn start(&mut self, token: Token, id: String, out: &mut Vec<Effect>) -> Result<(), Refusal> {
        self.on(&id, &[Status::Created])?;
        let call = agent::Call::Start {
            container: id.clone(),
        };
        self.call(What::Start(id), call, Some(token), out);
        Ok(())
    }

    fn exec(&mut self, token: Token, request: ExecRequest, out: &mut Vec<Effect>) -> Result<(), Refusal> {
        self.on(&request.container, &[Status::Created, Status::Running])?;
        let target = Target {
            container: request.container,
            exec: Some(request.exec.clone()),
        };
        let container = self
            .containers
            .get_mut(&target.container)
            .ok_or_else(|| Refusal::Unknown(target.container.clone()))?;
        if container.execs.contains_key(&request.exec) {
            return Err(Refusal::Exists(request.exec));
        }
        if container.execs.len() >= MOST {
            return Err(Refusal::Request(format!(
                "a container holds at most {MOST} further processes"
            )));
        }
        let process = Process {
            stand_in: request.stand_in,
            attached: true,
            exit: None,
        };
        container.execs.insert(request.exec.clone(), process);
        out.push(Effect::Adopt(token, target.clone()));
        out.push(Effect::Persist);
        let exec = agent::Exec {
            container: target.container.clone(),
            exec: request.exec,
            process: request.process,
            stdio: self.open_ports(&target, request.wanted),
        };
        self.call(
            What::Exec(target),
            agent::Call::Exec(Box::new(exec)),
            Some(token),
            out,
        );
        Ok(())
    }

    fn signal_request(
        &mut self,
        token: Token,
        container: String,
        (signal, all): (i32, bool),
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.on(&container, &ALIVE)?;
        self.signal(init_of(&container), signal, all, Some(token), out);
        Ok(())
    }

    fn wait(&mut self, token: Token, id: &str, out: &mut Vec<Effect>) -> Result<(), Refusal> {
        let container = self.container(id)?;
        match container.exit {
            Some(status) => out.push(Effect::Answer(token, Ok(Reply::Exited(status)))),
            None => container.waiters.push(token),
        }
        Ok(())
    }

    fn watch(&mut self, token: Token, id: &str) -> Result<(), Refusal> {
        let container = self.container(id)?;
        match container.status {
            Status::Stopped => Err(state_refusal(Status::Stopped, &ALIVE)),
            _ => {
                container.watchers.push(token);
                Ok(())
            }
        }
    }

    fn delete(&mut self, token: Token, id: &str, force: bool, out: &mut Vec<Effect>) -> Result<(), Refusal> {
        let last = self.containers.keys().all(|other| other == id);
        let Some(container) = self.containers.get_mut(id) else {
            out.push(Effect::Answer(token, Ok(Reply::Deleted { last })));
            if last {
                self.terminated(out);
            }
            return Ok(());
        };
        match container.status {
            Status::Stopped => {
                self.remove(id, Some(token), out);
                Ok(())
            }
            is if !force => Err(state_refusal(is, &[Status::Stopped])),
            _ if self.phase != Phase::Ready || container.status == Status::Creating => {
                self.abandon(id, out);
                out.push(Effect::Answer(token, Ok(Reply::Deleted { last })));
                Ok(())
            }
            _ => {
                container.deleting = Some(token);
                out.push(Effect::Arm(
                    Timer::Delete(id.to_owned()),
                    super::end::DELETE_LIMIT,
                ));
                self.signal(init_of(id), KILL, true, None, out);
                Ok(())
            }
        }
    }

    /// Takes a container out of the tables, and has the agent do the same if others stay.
    pub(super) fn remove(&mut self, id: &str, token: Option<Token>, out: &mut Vec<Effect>) {
        let Some(container) = self.containers.remove(id) else {
            return;
        };
        let (last, files) = (self.containers.is_empty(), container.files());
        self.ports.retain(|_, (target, _)| target.container != id);
        answer(token, Ok(Reply::Deleted { last }), out);
        for waiter in container.waiters.into_iter().chain(container.watchers) {
            out.push(Effect::Answer(waiter, Err(Refusal::Unknown(id.to_owned()))));
        }
        for exec in container.execs.keys() {
            out.push(Effect::Release(Target {
                container: id.to_owned(),
                exec: Some(exec.clone()),
            }));
        }
        out.push(Effect::Release(init_of(id)));
        out.push(Effect::Persist);
        if last {
            self.flush(out);
        } else {
            let call = agent::Call::Delete {
                container: id.to_owned(),
            };
            out.push(Effect::Unprepare(files));
            self.call(What::Delete(id.to_owned()), call, None, out);
            self.end_if_done(out);
        }
    }

    /// A container that could not be created: told to whoever asked, and taken out of the tables.
    pub(super) fn creation_failed(&mut self, id: &str, refusal: Refusal, out: &mut Vec<Effect>) {
        if let Some(container) = self.containers.get_mut(id) {
            answer(container.creating.take(), Err(refusal), out);
            self.remove(id, None, out);
        }
    }

    fn container(&mut self, id: &str) -> Result<&mut Container, Refusal> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Refusal::Unknown(id.to_owned()))
    }

    /// Whether a container is in one of these states.
    fn on(&mut self, id: &str, states: &[Status]) -> Result<(), Refusal> {
        let is = self.container(id)?.status;
        if states.contains(&is) {
            return Ok(());
        }
        Err(state_refusal(is, states))
    }
}

/// States in which a container has a process.
const ALIVE: [Status; 3] = [Status::Created, Status::Running, Status::Paused];

/// A container's own process.
pub(super) fn init_of(container: &str) -> Target {
    Target {
        container: container.to_owned(),
        exec: None,
    }
}

fn state_refusal(is: Status, needs: &[Status]) -> Refusal {
    let needs: Vec<String> = needs.iter().map(ToString::to_string).collect();
    Refusal::State {
        is,
        needs: needs.join(" or "),
    }
}
