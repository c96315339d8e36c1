// LONG: one table, a row per transition, and the events and states it is made of.
//! Each transition as a row: where a sandbox is, what happens, where it is then, and what is done about it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use caisson_wire::agent::{ExitStatus, Failure, FromAgent, Stage, Stats};
use caisson_wire::vmm::{Ended, ToVmm};
use oci_spec::runtime::Spec;

use super::super::state::{Network, Token};
use super::requests::init_of;
use super::*;
use crate::plan::{ContainerPlan, HostHooks, MachineChoice, NetworkNamespace, SandboxPlan};
use crate::process::ProcessId;
use crate::proto::{CreateRequest, ExecRequest, MachineFailure, Refusal, Request, Wanted};

const CREATE: Token = 1;
const START: Token = 2;
const OTHER: Token = 3;

#[test]
fn every_transition() {
    let rows: Vec<(&str, State, Event, Phase, &[&str])> = vec![
        // Coming up.
        (
            "a first request launches",
            State::default(),
            create("a", true, false),
            Phase::Launching,
            &["adopt a", "persist", "arm Boot", "launch"],
        ),
        (
            "a join needs a sandbox that is up",
            State::default(),
            create("a", false, false),
            Phase::Idle,
            &["answer 1 refused"],
        ),
        (
            "nothing to start yet",
            State::default(),
            start("a"),
            Phase::Idle,
            &["answer 2 refused"],
        ),
        (
            "told to end before anything",
            State::default(),
            Event::Terminated,
            Phase::Ended,
            &["persist", "kill vmm", "finish"],
        ),
        (
            "a launch that worked",
            launching(),
            Event::Launched(Ok(Network::default())),
            Phase::Booting,
            &["persist"],
        ),
        (
            "a launch that failed",
            launching(),
            Event::Launched(Err(failure())),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the machine's name is kept",
            booting(),
            started("kvm"),
            Phase::Booting,
            &["persist"],
        ),
        (
            "the agent dials in",
            booting(),
            dialled(agent::CONTROL_PORT),
            Phase::Ready,
            &[
                "stream agent",
                "disarm Boot",
                "agent Setup",
                "arm Call(1)",
                "agent Create",
                "arm Call(2)",
            ],
        ),
        (
            "another port before that",
            booting(),
            dialled(agent::FIRST_STREAM_PORT),
            Phase::Booting,
            &["stream drop"],
        ),
        (
            "nobody dials in",
            booting(),
            Event::Deadline(Timer::Boot),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the machine refuses",
            booting(),
            ended(End::Crashed("x".into())),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the guest powers off at once",
            booting(),
            ended(End::PowerOff),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the vmm process dies",
            booting(),
            Event::VmmGone("x".into()),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the client leaves during the boot",
            booting(),
            Event::Dropped(CREATE),
            Phase::Stopping,
            &["vmm Shutdown", "arm Stop"],
        ),
        (
            "the stand-in dies during the boot",
            booting(),
            Event::StandInGone(init_of("a")),
            Phase::Stopping,
            &["vmm Shutdown", "arm Stop"],
        ),
        (
            "a signal during the boot",
            booting(),
            signalled("a", 15),
            Phase::Stopping,
            &["vmm Shutdown", "arm Stop"],
        ),
        (
            "a harmless signal during the boot",
            booting(),
            signalled("a", 18),
            Phase::Booting,
            &[],
        ),
        // Setting up and creating.
        (
            "the guest is set up",
            ready(),
            did(1),
            Phase::Ready,
            &["disarm Call(1)"],
        ),
        (
            "the guest cannot be set up",
            ready(),
            failed(1),
            Phase::Ended,
            &[
                "disarm Call(1)",
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the set-up takes too long",
            ready(),
            Event::Deadline(Timer::Call(1)),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "the control port once more",
            ready(),
            dialled(agent::CONTROL_PORT),
            Phase::Ready,
            &["stream drop"],
        ),
        (
            "a stream that is expected",
            ready(),
            dialled(agent::FIRST_STREAM_PORT),
            Phase::Ready,
            &["stream a Stdout"],
        ),
        (
            "the container is created",
            ready(),
            process(2),
            Phase::Ready,
            &["disarm Call(2)", "persist", "answer 1 done"],
        ),
        (
            "the container is refused",
            ready(),
            failed(2),
            Phase::Flushing,
            &[
                "disarm Call(2)",
                "answer 1 refused",
                "release a",
                "persist",
                "disarm Drain",
                "agent Shutdown",
                "arm Call(3)",
                "arm Flush",
            ],
        ),
        (
            "the container takes too long",
            ready(),
            Event::Deadline(Timer::Call(2)),
            Phase::Flushing,
            &[
                "answer 1 refused",
                "release a",
                "persist",
                "disarm Drain",
                "agent Shutdown",
                "arm Call(3)",
                "arm Flush",
            ],
        ),
        (
            "an answer of another kind",
            ready(),
            did(2),
            Phase::Ended,
            &[
                "disarm Call(2)",
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "an answer to nothing",
            ready(),
            did(77),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "news of a container that is none",
            ready(),
            oom("zz"),
            Phase::Ended,
            &[
                "answer 1 refused",
                "persist",
                "kill vmm",
                "disarm Streams",
                "tell a exited",
                "finish",
            ],
        ),
        (
            "a start in the same flight",
            booting_to_run(),
            dialled(agent::CONTROL_PORT),
            Phase::Ready,
            &[
                "stream agent",
                "disarm Boot",
                "agent Setup",
                "arm Call(1)",
                "agent Create",
                "arm Call(2)",
                "agent Start",
                "arm Call(3)",
            ],
        ),
        // Created.
        (
            "started",
            created(),
            start("a"),
            Phase::Ready,
            &["agent Start", "arm Call(3)"],
        ),
        (
            "a signal before the start",
            created(),
            signal_request("a", 9),
            Phase::Ready,
            &["agent Signal", "arm Call(3)"],
        ),
        (
            "a pause before the start",
            created(),
            pause("a"),
            Phase::Ready,
            &["answer 3 refused"],
        ),
        (
            "an exec before the start",
            created(),
            exec("a", "e"),
            Phase::Ready,
            &["adopt a/e", "persist", "agent Exec", "arm Call(3)"],
        ),
        (
            "a second container",
            created(),
            create("b", false, false),
            Phase::Ready,
            &["adopt b", "persist", "prepare b"],
        ),
        (
            "the same id again",
            created(),
            create("a", false, false),
            Phase::Ready,
            &["answer 1 refused"],
        ),
        (
            "a second sandbox",
            created(),
            create("b", true, false),
            Phase::Ready,
            &["answer 1 refused"],
        ),
        (
            "deleted without force",
            created(),
            delete("a", false),
            Phase::Ready,
            &["answer 3 refused"],
        ),
        (
            "deleted with force",
            created(),
            delete("a", true),
            Phase::Ready,
            &["arm Delete(\"a\")", "agent Signal", "arm Call(3)"],
        ),
        // Running.
        (
            "it runs",
            starting(),
            did(3),
            Phase::Ready,
            &["disarm Call(3)", "persist", "answer 2 done"],
        ),
        (
            "it cannot start",
            starting(),
            failed(3),
            Phase::Ready,
            &[
                "disarm Call(3)",
                "answer 2 refused",
                "disarm Streams",
                "tell a exited",
                "persist",
                "arm Drain",
            ],
        ),
        (
            "the start is not answered",
            starting(),
            Event::Deadline(Timer::Call(3)),
            Phase::Ready,
            &["answer 2 refused"],
        ),
        (
            "it ended before its start was answered",
            starting(),
            exited("a", None),
            Phase::Ready,
            &["disarm Streams", "tell a exited", "persist", "arm Drain"],
        ),
        (
            "a signal to the stand-in",
            running(),
            signalled("a", 15),
            Phase::Ready,
            &["agent Signal", "arm Call(4)"],
        ),
        (
            "a signal of an unknown stand-in",
            running(),
            signalled("b", 15),
            Phase::Ready,
            &[],
        ),
        (
            "paused",
            pausing(),
            did(4),
            Phase::Ready,
            &["disarm Call(4)", "persist", "answer 3 done"],
        ),
        (
            "a refused pause",
            pausing(),
            failed(4),
            Phase::Ready,
            &["disarm Call(4)", "answer 3 refused"],
        ),
        (
            "resumed while it runs",
            running(),
            resume("a"),
            Phase::Ready,
            &["answer 3 refused"],
        ),
        (
            "measured: the guest, then the machine",
            measuring(),
            stats(4),
            Phase::Ready,
            &["disarm Call(4)", "vmm Ask", "arm Order(5)"],
        ),
        ("a late answer", late(), did(4), Phase::Ready, &[]),
        (
            "a kill that is not carried out",
            killing(),
            Event::Deadline(Timer::Call(4)),
            Phase::Stopping,
            &["answer 3 done", "vmm Shutdown", "arm Stop"],
        ),
        (
            "the stand-in dies",
            running(),
            Event::StandInGone(init_of("a")),
            Phase::Ready,
            &["agent Signal", "arm Call(4)"],
        ),
        ("waited for", running(), wait("a"), Phase::Ready, &[]),
        (
            "waited for in vain",
            running(),
            wait("b"),
            Phase::Ready,
            &["answer 3 refused"],
        ),
        (
            "the end of a process that is none",
            running(),
            exited("b", None),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "the agent's stream ends",
            running(),
            Event::AgentGone("x".into()),
            Phase::Ready,
            &["arm LastWords"],
        ),
        (
            "and nobody says why",
            agent_lost(),
            Event::Deadline(Timer::LastWords),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "the machine crashes",
            running(),
            ended(End::Crashed("x".into())),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "the guest powers off by itself",
            running(),
            ended(End::PowerOff),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "told to end",
            running(),
            Event::Terminated,
            Phase::Flushing,
            &["disarm Drain", "agent Shutdown", "arm Call(4)", "arm Flush"],
        ),
        // Ending.
        (
            "its process ends",
            running(),
            exited("a", None),
            Phase::Ready,
            &["disarm Streams", "tell a exited", "persist", "arm Drain"],
        ),
        (
            "its process ends with a stream to come",
            running_with_a_stream_to_come(),
            exited("a", None),
            Phase::Ready,
            &["arm Streams", "persist", "arm Drain"],
        ),
        (
            "the output is written",
            stopped(),
            Event::StandInGone(init_of("a")),
            Phase::Flushing,
            &["disarm Drain", "agent Shutdown", "arm Call(4)", "arm Flush"],
        ),
        (
            "the output is not taken",
            stopped(),
            Event::Deadline(Timer::Drain),
            Phase::Flushing,
            &["disarm Drain", "agent Shutdown", "arm Call(4)", "arm Flush"],
        ),
        (
            "deleted when it has stopped",
            stopped(),
            delete("a", false),
            Phase::Flushing,
            &[
                "answer 3 last",
                "release a",
                "persist",
                "disarm Drain",
                "agent Shutdown",
                "arm Call(4)",
                "arm Flush",
            ],
        ),
        (
            "the guest powers off as told",
            flushing(),
            ended(End::PowerOff),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "its stream ends first",
            flushing(),
            Event::AgentGone("x".into()),
            Phase::Flushing,
            &[],
        ),
        (
            "it does not power off",
            flushing(),
            Event::Deadline(Timer::Flush),
            Phase::Stopping,
            &["vmm Shutdown", "arm Stop"],
        ),
        (
            "a request while it ends",
            flushing(),
            start("a"),
            Phase::Flushing,
            &["answer 2 refused"],
        ),
        (
            "a container while it ends",
            flushing(),
            create("b", false, false),
            Phase::Flushing,
            &["answer 1 refused"],
        ),
        (
            "the vmm process ends as told",
            stopping(),
            ended(End::Stopped),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "the vmm process does not end",
            stopping(),
            Event::Deadline(Timer::Stop),
            Phase::Ended,
            &["persist", "kill vmm", "disarm Streams", "tell a exited", "finish"],
        ),
        (
            "a request after the end",
            over(),
            start("a"),
            Phase::Ended,
            &["answer 2 refused"],
        ),
        (
            "a stream after the end",
            over(),
            dialled(5),
            Phase::Ended,
            &["stream drop"],
        ),
        (
            "anything else after the end",
            over(),
            Event::VmmGone("x".into()),
            Phase::Ended,
            &[],
        ),
    ];
    for (what, state, event, phase, effects) in rows {
        let (after, done) = step(state, event);
        let done: Vec<String> = done.iter().map(tag).collect();
        assert_eq!(
            (after.phase, done),
            (phase, effects.iter().map(ToString::to_string).collect()),
            "{what}"
        );
    }
}

#[test]
fn the_status_follows_the_process() {
    let status = |state: &State| state.containers["a"].status;
    assert_eq!(status(&launching()), Status::Creating);
    assert_eq!(status(&created()), Status::Created);
    assert_eq!(status(&running()), Status::Running);
    assert_eq!(status(&step(pausing(), did(4)).0), Status::Paused);
    assert_eq!(status(&stopped()), Status::Stopped);
    // An answer that comes after the end changes nothing any more.
    let ended_early = step(starting(), exited("a", None)).0;
    assert_eq!(status(&step(ended_early, did(3)).0), Status::Stopped);
}

#[test]
fn a_machine_that_dies_kills_its_containers_and_says_why() {
    let (state, _) = step(running(), Event::VmmGone("it was killed".into()));
    let container = &state.containers["a"];
    assert_eq!(container.exit, Some(ExitStatus::Signal(9)));
    assert_eq!(
        container.failure.as_deref(),
        Some("cannot keep the guest running: it was killed")
    );
}

#[test]
fn an_exec_that_ended_is_forgotten_when_its_stand_in_has_gone() {
    let (state, _) = step(running(), exec("a", "e"));
    let (state, done) = step(state, exited("a", Some("e")));
    assert_eq!(
        done.iter().map(tag).collect::<Vec<_>>(),
        ["disarm Streams", "tell a/e exited"]
    );
    let target = Target {
        container: "a".into(),
        exec: Some("e".into()),
    };
    let (state, _) = step(state, Event::StandInGone(target));
    assert!(state.containers["a"].execs.is_empty());
    assert_eq!(state.phase, Phase::Ready);
}

#[test]
fn an_end_is_told_after_the_last_stream_has_come_or_its_time_is_over() {
    let waiting = || step(running_with_a_stream_to_come(), exited("a", None)).0;
    let (_, done) = step(waiting(), dialled(agent::FIRST_STREAM_PORT));
    assert_eq!(
        done.iter().map(tag).collect::<Vec<_>>(),
        ["stream a Stdout", "disarm Streams", "tell a exited"]
    );
    let (_, done) = step(waiting(), Event::Deadline(Timer::Streams(init_of("a"))));
    assert_eq!(
        done.iter().map(tag).collect::<Vec<_>>(),
        ["disarm Streams", "tell a exited"]
    );
}

#[test]
fn a_port_serves_once() {
    let (state, _) = step(ready(), dialled(agent::FIRST_STREAM_PORT));
    let (_, done) = step(state, dialled(agent::FIRST_STREAM_PORT));
    assert_eq!(done.iter().map(tag).collect::<Vec<_>>(), ["stream drop"]);
}

#[test]
fn others_keep_a_sandbox_when_one_of_its_containers_goes() {
    let (state, _) = step(running(), create("b", false, false));
    let (state, done) = step(state, Event::Prepared("b".into(), Ok(())));
    assert_eq!(
        done.iter().map(tag).collect::<Vec<_>>(),
        ["agent Create", "arm Call(4)"]
    );
    let (state, _) = step(state, process(4));
    let (state, _) = step(state, exited("a", None));
    let (state, _) = step(state, Event::StandInGone(init_of("a")));
    let (state, done) = step(state, delete("a", false));
    assert_eq!(state.phase, Phase::Ready);
    assert_eq!(
        done.iter().map(tag).collect::<Vec<_>>(),
        [
            "answer 3 deleted",
            "release a",
            "persist",
            "unprepare",
            "agent Delete",
            "arm Call(5)"
        ]
    );
}

#[test]
fn an_agent_that_is_late_too_often_is_given_up() {
    let mut state = running();
    for round in 0..=MOST_LATE {
        assert_eq!(state.phase, Phase::Ready, "after {round}");
        state = step(state, pause("a")).0;
        let id = state.last_id;
        state = step(state, Event::Deadline(Timer::Call(id))).0;
    }
    assert_eq!(state.phase, Phase::Ended);
}

#[test]
fn what_a_guest_says_of_itself_is_cut_to_size() {
    let text = format!("{}\n\x1b[31m", "é".repeat(5000));
    let outcome = Err(Failure {
        stage: Stage::Mounts,
        message: text,
        errno: None,
    });
    let (_, done) = step(ready(), Event::Agent(FromAgent::Answer { id: 2, outcome }));
    let Some(Effect::Answer(_, Err(Refusal::Guest(failure)))) = done.get(1) else {
        panic!("{done:?}");
    };
    assert!(failure.message.len() <= 2048 && !failure.message.contains('\x1b'));

    let mut state = booting();
    for _ in 0..100 {
        state = step(state, Event::Console(vec![b'x'; 1000])).0;
    }
    assert_eq!(state.console.len(), CONSOLE_TAIL);
    let state = step(state, started(&"<script>".repeat(1000))).0;
    assert_eq!(state.machine.as_deref(), Some("scriptscriptscri"));
    let console = "é".repeat(CONSOLE_TAIL);
    let state = step(
        state,
        Event::Vmm(FromVmm::Ended(Ended {
            how: End::Reset,
            console,
        })),
    )
    .0;
    assert!(state.failure.unwrap().console.len() <= CONSOLE_TAIL);
    let impossible = FromAgent::Exited {
        target: init_of("a"),
        status: ExitStatus::Signal(-5),
    };
    assert_eq!(
        step(running(), Event::Agent(impossible)).0.containers["a"].exit,
        Some(ExitStatus::Signal(9))
    );
}

fn tag(effect: &Effect) -> String {
    let name = |target: &Target| match &target.exec {
        None => target.container.clone(),
        Some(exec) => format!("{}/{exec}", target.container),
    };
    let timer = |timer: &Timer| match timer {
        Timer::Streams(_) => "Streams".to_owned(),
        timer => format!("{timer:?}"),
    };
    let first_word = |text: String| text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned();
    match effect {
        Effect::Persist => "persist".to_owned(),
        Effect::Answer(token, Ok(Reply::Deleted { last: true })) => format!("answer {token} last"),
        Effect::Answer(token, Ok(Reply::Deleted { last: false })) => format!("answer {token} deleted"),
        Effect::Answer(token, Ok(_)) => format!("answer {token} done"),
        Effect::Answer(token, Err(_)) => format!("answer {token} refused"),
        Effect::Adopt(_, target) => format!("adopt {}", name(target)),
        Effect::ToStandIn(target, ToStandIn::Exited(_)) => format!("tell {} exited", name(target)),
        Effect::ToStandIn(target, ToStandIn::Stream(_)) => format!("tell {} stream", name(target)),
        Effect::Release(target) => format!("release {}", name(target)),
        Effect::Launch(_) => "launch".to_owned(),
        Effect::Prepare(container) => format!("prepare {container}"),
        Effect::Unprepare(_) => "unprepare".to_owned(),
        Effect::ToVmm(ToVmm::Ask { .. }) => "vmm Ask".to_owned(),
        Effect::ToVmm(message) => format!("vmm {message:?}"),
        Effect::ToAgent(request) => format!("agent {}", first_word(format!("{:?}", request.call))),
        Effect::Stream(StreamUse::Agent) => "stream agent".to_owned(),
        Effect::Stream(StreamUse::Drop) => "stream drop".to_owned(),
        Effect::Stream(StreamUse::StandIn(target, stream)) => format!("stream {} {stream:?}", name(target)),
        Effect::Arm(of, _) => format!("arm {}", timer(of)),
        Effect::Disarm(of) => format!("disarm {}", timer(of)),
        Effect::KillVmm => "kill vmm".to_owned(),
        Effect::Finish => "finish".to_owned(),
    }
}

// States, each from the one before it.

fn launching() -> State {
    step(State::default(), create("a", true, false)).0
}

fn booting() -> State {
    step(launching(), Event::Launched(Ok(Network::default()))).0
}

fn booting_to_run() -> State {
    let state = step(State::default(), create("a", true, true)).0;
    step(state, Event::Launched(Ok(Network::default()))).0
}

fn ready() -> State {
    step(booting(), dialled(agent::CONTROL_PORT)).0
}

fn created_with_a_stream_to_come() -> State {
    step(step(ready(), did(1)).0, process(2)).0
}

fn created() -> State {
    step(created_with_a_stream_to_come(), dialled(agent::FIRST_STREAM_PORT)).0
}

fn starting() -> State {
    step(created(), start("a")).0
}

fn running() -> State {
    step(starting(), did(3)).0
}

fn running_with_a_stream_to_come() -> State {
    step(step(created_with_a_stream_to_come(), start("a")).0, did(3)).0
}

fn pausing() -> State {
    step(running(), pause("a")).0
}

fn late() -> State {
    step(pausing(), Event::Deadline(Timer::Call(4))).0
}

fn killing() -> State {
    step(running(), signal_request("a", 9)).0
}

fn measuring() -> State {
    step(
        running(),
        Event::Request(
            OTHER,
            Request::Stats {
                container: "a".into(),
            },
        ),
    )
    .0
}

fn agent_lost() -> State {
    step(running(), Event::AgentGone("x".into())).0
}

fn stopped() -> State {
    step(running(), exited("a", None)).0
}

fn flushing() -> State {
    step(stopped(), Event::StandInGone(init_of("a"))).0
}

fn stopping() -> State {
    step(flushing(), Event::Deadline(Timer::Flush)).0
}

fn over() -> State {
    step(stopping(), Event::Deadline(Timer::Stop)).0
}

// Events.

fn create(id: &str, sandbox: bool, start: bool) -> Event {
    let request = CreateRequest {
        sandbox: sandbox.then(|| Box::new(sandbox_plan())),
        container: container_plan(id),
        wanted: Wanted {
            stdout: true,
            ..Wanted::default()
        },
        start,
        stand_in: ProcessId { pid: 1, start: 1 },
    };
    Event::Request(CREATE, Request::Create(Box::new(request)))
}

fn exec(container: &str, exec: &str) -> Event {
    let request = ExecRequest {
        container: container.into(),
        exec: exec.into(),
        process: oci_spec::runtime::Process::default(),
        wanted: Wanted::default(),
        stand_in: Some(ProcessId { pid: 2, start: 1 }),
    };
    Event::Request(OTHER, Request::Exec(Box::new(request)))
}

fn start(container: &str) -> Event {
    Event::Request(
        START,
        Request::Start {
            container: container.into(),
        },
    )
}

fn pause(container: &str) -> Event {
    Event::Request(
        OTHER,
        Request::Pause {
            container: container.into(),
        },
    )
}

fn resume(container: &str) -> Event {
    Event::Request(
        OTHER,
        Request::Resume {
            container: container.into(),
        },
    )
}

fn wait(container: &str) -> Event {
    Event::Request(
        OTHER,
        Request::Wait {
            container: container.into(),
        },
    )
}

fn delete(container: &str, force: bool) -> Event {
    Event::Request(
        OTHER,
        Request::Delete {
            container: container.into(),
            force,
        },
    )
}

fn signal_request(container: &str, signal: i32) -> Event {
    Event::Request(
        OTHER,
        Request::Signal {
            container: container.into(),
            signal,
            all: false,
        },
    )
}

fn signalled(container: &str, signal: i32) -> Event {
    Event::StandIn(init_of(container), FromStandIn::Signal(signal))
}

fn started(machine: &str) -> Event {
    Event::Vmm(FromVmm::Started {
        machine: machine.into(),
        built_us: 1,
    })
}

fn dialled(port: u32) -> Event {
    Event::Vmm(FromVmm::GuestConnected { port })
}

fn ended(how: End) -> Event {
    Event::Vmm(FromVmm::Ended(Ended {
        how,
        console: String::new(),
    }))
}

fn answered(id: u64, outcome: Result<agent::Reply, Failure>) -> Event {
    Event::Agent(FromAgent::Answer { id, outcome })
}

fn did(id: u64) -> Event {
    answered(id, Ok(agent::Reply::Done))
}

fn process(id: u64) -> Event {
    answered(id, Ok(agent::Reply::Process { pid: 17 }))
}

fn stats(id: u64) -> Event {
    answered(id, Ok(agent::Reply::Stats(Box::<Stats>::default())))
}

fn failed(id: u64) -> Event {
    answered(
        id,
        Err(Failure {
            stage: Stage::Mounts,
            message: "no".into(),
            errno: None,
        }),
    )
}

fn exited(container: &str, exec: Option<&str>) -> Event {
    let target = Target {
        container: container.into(),
        exec: exec.map(str::to_owned),
    };
    Event::Agent(FromAgent::Exited {
        target,
        status: ExitStatus::Code(0),
    })
}

fn oom(container: &str) -> Event {
    Event::Agent(FromAgent::OutOfMemory {
        container: container.into(),
    })
}

fn failure() -> MachineFailure {
    MachineFailure {
        stage: "open the kernel".into(),
        cause: "no".into(),
        console: String::new(),
    }
}

fn sandbox_plan() -> SandboxPlan {
    SandboxPlan {
        id: "a".into(),
        machine: MachineChoice::Native,
        vcpus: 1,
        memory: 64 << 20,
        kernel: PathBuf::new(),
        initramfs: PathBuf::new(),
        cmdline: String::new(),
        setup: agent::Setup::default(),
        netns: None,
        cgroup: None,
        confine: true,
        boot_deadline: Duration::from_secs(10),
        call_deadline: Duration::from_secs(5),
    }
}

fn container_plan(id: &str) -> ContainerPlan {
    ContainerPlan {
        id: id.into(),
        bundle: PathBuf::new(),
        oci_version: String::new(),
        annotations: BTreeMap::new(),
        create: agent::Create {
            container: id.into(),
            root: agent::Root::Share {
                path: "rootfs".into(),
            },
            spec: Spec::default(),
            stdio: agent::Stdio::default(),
            join: BTreeMap::new(),
        },
        binds: Vec::new(),
        hooks: HostHooks::default(),
        terminal: false,
        netns: NetworkNamespace::Caller,
    }
}
