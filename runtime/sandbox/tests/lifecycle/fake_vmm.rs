//! A vmm process and an agent without a machine: they keep the protocol, or break it as the test asks.
//!
//! How they behave is in the plan's kernel command line; what a process does is in its arguments.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use caisson_wire::agent::{
    CONTROL_PORT, Call, ExitStatus, FROM_GUEST_LIMIT, Failure, FromAgent, ProcessInfo, Reply, Request, Stage,
    Stdio, TO_GUEST_LIMIT, Target,
};
use caisson_wire::vmm::{Answer, End, Ended, FromVmm, LIMIT, Launch, Order, ToVmm, Usage};
use caisson_wire::{Receiver, Sender, channel};

/// The control socket's number.
const SOCKET: i32 = 3;

/// Sends the vmm process's messages, and nothing after the last one.
type ToSupervisor = Arc<Mutex<Sender>>;

pub(crate) fn main() -> ExitCode {
    // SAFETY: the supervisor starts this process with its socket there, and nothing else has taken it.
    let socket = unsafe { OwnedFd::from_raw_fd(SOCKET) };
    let (sender, mut receiver) = channel(socket, LIMIT).unwrap();
    let (first, descriptors) = receiver.recv::<ToVmm>().unwrap();
    let ToVmm::Launch(launch) = first else {
        return ExitCode::FAILURE;
    };
    let sender = Arc::new(Mutex::new(sender));
    boot(&launch, &descriptors, &sender);
    serve(&mut receiver, &sender, &launch);
    ExitCode::SUCCESS
}

fn boot(launch: &Launch, descriptors: &[OwnedFd], sender: &ToSupervisor) {
    let nets: Vec<_> = launch.nets.iter().map(|net| (net.mac, net.mtu)).collect();
    match launch.cmdline.as_str() {
        "network" => assert_eq!(nets, [([2, 0, 0, 0, 0, 7], 1400)]),
        "offline" => assert_eq!(nets, []),
        _ => {}
    }
    let console = &descriptors[launch.console.unwrap().0 as usize];
    rustix::io::write(console, b"guest console: early message\n").unwrap();
    match launch.cmdline.as_str() {
        "refuse" => end(
            sender,
            End::Refused {
                stage: "open /dev/kvm".to_owned(),
                cause: "Permission denied".to_owned(),
            },
        ),
        "panic" => {
            rustix::io::write(console, b"Kernel panic - not syncing\n").unwrap();
            end(sender, End::Reset);
        }
        "vanish" => {
            eprintln!("out of luck");
            std::process::exit(9);
        }
        "nonsense" => {
            let stdout = sender.lock().unwrap();
            stdout.send(&"this is no message").unwrap();
        }
        _ => {}
    }
    tell(
        sender,
        &FromVmm::Started {
            machine: "fake".to_owned(),
            built_us: 1,
        },
    );
    if launch.cmdline == "silent" {
        return;
    }
    // Ports that nobody named are dropped; whoever dials them sees the end at once.
    let mut stray = dial(sender, 4242);
    assert_eq!(stray.read(&mut [0; 1]).unwrap(), 0);

    let control = dial(sender, CONTROL_PORT);
    let share = descriptors[launch.share.unwrap().0 as usize].try_clone().unwrap();
    let agent = Agent {
        to_supervisor: Arc::clone(sender),
        mode: launch.cmdline.clone(),
        share,
        processes: HashMap::new(),
    };
    std::thread::spawn(move || agent.serve(control));
}

fn serve(receiver: &mut Receiver, sender: &ToSupervisor, launch: &Launch) {
    while let Ok((message, _)) = receiver.recv::<ToVmm>() {
        match message {
            ToVmm::Shutdown if launch.cmdline == "stuck" => {}
            ToVmm::Shutdown | ToVmm::Launch(_) => end(sender, End::Stopped),
            ToVmm::Ask { id, order } => {
                let answer = match order {
                    Order::Usage => Answer::Usage(Usage {
                        guest_resident: 4096,
                        vcpu_us: 7,
                    }),
                    Order::Pause | Order::Resume => Answer::Done,
                };
                let outcome = Ok(answer);
                tell(sender, &FromVmm::Answer { id, outcome });
            }
        }
    }
}

fn tell(sender: &ToSupervisor, message: &FromVmm) {
    sender.lock().unwrap().send(message).unwrap();
}

fn end(sender: &ToSupervisor, how: End) -> ! {
    let console = "guest console: last words\n".to_owned();
    tell(sender, &FromVmm::Ended(Ended { how, console }));
    std::process::exit(0);
}

/// A connection of the guest to the host's `port`: gives the guest's end.
fn dial(sender: &ToSupervisor, port: u32) -> UnixStream {
    let (host, guest) = UnixStream::pair().unwrap();
    let message = FromVmm::GuestConnected { port };
    sender
        .lock()
        .unwrap()
        .send_with(&message, &[host.as_fd()])
        .unwrap();
    guest
}

struct Agent {
    to_supervisor: ToSupervisor,
    mode: String,
    share: OwnedFd,
    processes: HashMap<Target, Process>,
}

/// A process that was created; it takes signals once it runs.
struct Process {
    arguments: Vec<String>,
    streams: Streams,
    signals: (mpsc::Sender<i32>, Option<mpsc::Receiver<i32>>),
}

#[derive(Default)]
struct Streams {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

impl Agent {
    fn serve(mut self, control: UnixStream) {
        let (sender, _) = channel(control.try_clone().unwrap().into(), FROM_GUEST_LIMIT).unwrap();
        let (_, mut receiver) = channel(control.into(), TO_GUEST_LIMIT).unwrap();
        while let Ok((Request { id, call }, _)) = receiver.recv::<Request>() {
            if self.mode == "mute" && !matches!(call, Call::Setup(_)) {
                continue;
            }
            if self.mode == "lie" && matches!(call, Call::Start { .. }) {
                let outcome = Ok(Reply::Done);
                sender
                    .send(&FromAgent::Answer {
                        id: id + 1000,
                        outcome,
                    })
                    .unwrap();
                continue;
            }
            if self.mode == "die" && matches!(call, Call::Start { .. }) {
                return;
            }
            let shutdown = matches!(call, Call::Shutdown);
            let outcome = self.carry_out(call, &sender);
            if sender.send(&FromAgent::Answer { id, outcome }).is_err() {
                return;
            }
            if shutdown {
                end(&self.to_supervisor, End::PowerOff);
            }
        }
    }

    fn carry_out(&mut self, call: Call, sender: &Sender) -> Result<Reply, Failure> {
        match call {
            Call::Setup(setup) => {
                assert!(setup.time_ns > 0 && setup.entropy.iter().any(|byte| *byte != 0));
                if self.mode == "network" {
                    let eth0 = setup.interfaces.first().expect("there is an interface");
                    let address = ("10.77.0.2".parse().unwrap(), 24);
                    assert_eq!((&*eth0.name, &*eth0.addresses), ("eth0", &[address][..]));
                    let gateway = Some("10.77.0.1".parse().unwrap());
                    assert!(setup.routes.iter().any(|route| route.via == gateway));
                }
            }
            Call::Create(create) => {
                let target = Target {
                    container: create.container,
                    exec: None,
                };
                let process = create.spec.process().clone().unwrap_or_default();
                return self.create(target, process.args().clone().unwrap_or_default(), &create.stdio);
            }
            Call::Exec(exec) => {
                let target = Target {
                    container: exec.container,
                    exec: Some(exec.exec),
                };
                let arguments = exec.process.args().clone().unwrap_or_default();
                let reply = self.create(target.clone(), arguments, &exec.stdio)?;
                self.start(&target, sender)?;
                return Ok(reply);
            }
            Call::Start { container } => {
                let target = Target {
                    container,
                    exec: None,
                };
                if self.mode == "oom" {
                    let container = target.container.clone();
                    sender.send(&FromAgent::OutOfMemory { container }).unwrap();
                }
                self.start(&target, sender)?;
            }
            Call::Signal { target, signal, all } => {
                for (of, process) in &self.processes {
                    if *of == target || (all && of.container == target.container) {
                        // One that has ended takes none.
                        let _ = process.signals.0.send(signal);
                    }
                }
                let killed = self.processes.get_mut(&target).filter(|_| signal == 9);
                if let Some(process) = killed
                    && process.signals.1.take().is_some()
                {
                    // It was never started, so no thread plays it.
                    let status = ExitStatus::Signal(9);
                    process.streams = Streams::default();
                    sender.send(&FromAgent::Exited { target, status }).unwrap();
                }
            }
            Call::Resize { target, size } if self.mode == "resize" && size.rows > 0 => {
                // One that has ended takes none.
                let _ = self.processes[&target].signals.0.send(size.rows.into());
            }
            Call::Processes { .. } => {
                return Ok(Reply::Processes(vec![ProcessInfo {
                    pid: 17,
                    parent: 1,
                    inner_pid: 1,
                    uid: 0,
                    cpu_ms: 1,
                    start_s: 1,
                    terminal: "?".to_owned(),
                    command: "sleep".to_owned(),
                }]));
            }
            Call::Stats { .. } => return Ok(Reply::Stats(Box::default())),
            _ => {}
        }
        Ok(Reply::Done)
    }

    fn create(&mut self, target: Target, arguments: Vec<String>, stdio: &Stdio) -> Result<Reply, Failure> {
        if arguments.first().is_some_and(|name| name == "missing") {
            return Err(Failure {
                stage: Stage::Program,
                message: "missing: No such file or directory".to_owned(),
                errno: Some(2),
            });
        }
        let dial = |port| dial(&self.to_supervisor, port);
        let terminal = stdio.terminal.as_ref().map(|terminal| dial(terminal.port));
        let streams = Streams {
            stdin: stdio
                .stdin
                .map(dial)
                .or_else(|| terminal.as_ref().map(|stream| stream.try_clone().unwrap())),
            stdout: stdio.stdout.map(dial).or(terminal),
            stderr: stdio.stderr.map(dial),
        };
        let (sender, receiver) = mpsc::channel();
        let process = Process {
            arguments,
            streams,
            signals: (sender, Some(receiver)),
        };
        self.processes.insert(target, process);
        Ok(Reply::Process { pid: 17 })
    }

    fn start(&mut self, target: &Target, sender: &Sender) -> Result<(), Failure> {
        let process = self.processes.get_mut(target).ok_or_else(|| Failure {
            stage: Stage::Request,
            message: "no such process".to_owned(),
            errno: None,
        })?;
        let (arguments, streams) = (process.arguments.clone(), std::mem::take(&mut process.streams));
        let signals = process.signals.1.take().unwrap();
        let (sender, target) = (sender.clone(), target.clone());
        let share = self.share.try_clone().unwrap();
        std::thread::spawn(move || {
            let status = play(&arguments, streams, &signals, &share);
            // The sandbox may have ended with the test.
            let _ = sender.send(&FromAgent::Exited { target, status });
        });
        Ok(())
    }
}

/// What a process does.
fn play(
    arguments: &[String],
    mut streams: Streams,
    signals: &mpsc::Receiver<i32>,
    share: &OwnedFd,
) -> ExitStatus {
    let argument = arguments.get(1).map_or("", String::as_str);
    let mut print = |text: &[u8]| {
        if let Some(stdout) = &mut streams.stdout {
            // Nobody may be there to read it.
            let _ = stdout.write_all(text);
        }
    };
    match arguments.first().map(String::as_str) {
        Some("print") => {
            print(argument.as_bytes());
            if let Some(stderr) = &mut streams.stderr {
                stderr.write_all(b"to stderr").unwrap();
            }
            ExitStatus::Code(0)
        }
        Some("show") => {
            // A file of the shared directory, as the file server would reach it.
            let file = rustix::fs::openat(
                share,
                argument,
                rustix::fs::OFlags::RDONLY,
                rustix::fs::Mode::empty(),
            );
            match file {
                Ok(file) => {
                    let mut text = Vec::new();
                    std::fs::File::from(file).read_to_end(&mut text).unwrap();
                    print(&text);
                    ExitStatus::Code(0)
                }
                Err(err) => {
                    print(err.to_string().as_bytes());
                    ExitStatus::Code(1)
                }
            }
        }
        Some("cat") => {
            let mut stdin = streams.stdin.take().unwrap();
            let mut bytes = [0; 4096];
            while let Ok(got) = stdin.read(&mut bytes)
                && got > 0
            {
                print(&bytes[..got]);
            }
            print(b"<end>");
            ExitStatus::Code(0)
        }
        Some("flood") => {
            print(&vec![b'x'; argument.parse().unwrap()]);
            ExitStatus::Code(0)
        }
        Some("exit") => ExitStatus::Code(argument.parse().unwrap()),
        // Ends by the first signal it gets.
        _ => {
            print(b"ready\n");
            signals.recv().map_or(ExitStatus::Code(1), ExitStatus::Signal)
        }
    }
}
