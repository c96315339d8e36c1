// LONG: the list of cases, each a story of its own.
//! The cases.

use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use caisson_sandbox::Status;
use caisson_sandbox::client::{Event, Force, Reach};
use caisson_sandbox::plan::{Bind, CgroupPlan, NetworkNamespace};
use caisson_wire::agent::ExitStatus;
use oci_spec::runtime::{Hook, HookBuilder, LinuxResources};

use crate::bench::{
    Case, PROMISED, SOON, Verb, World, chain, eventually, finish, is_alive, kill, reap, within,
};

macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        pub(crate) const ALL: &[Case] = &[$((stringify!($case), $case)),*];
    };
}

cases![
    run_writes_the_output_and_leaves_with_the_code,
    input_reaches_the_process_and_its_end_too,
    a_created_container_waits_starts_and_leaves_its_status,
    a_process_killed_by_a_signal_leaves_a_stand_in_killed_by_it,
    a_signal_to_the_stand_in_reaches_the_process,
    a_missing_program_is_said_and_leaves_nothing,
    exec_runs_beside_and_tells_its_own_status,
    a_detached_exec_has_a_stand_in_of_its_own,
    a_container_that_was_never_started_can_be_deleted,
    a_second_container_shares_the_sandbox_and_may_outlive_the_first,
    controls_reach_the_guest,
    memory_events_and_the_end_are_seen_by_a_watcher,
    files_are_shared_and_no_mount_is_seen_on_the_host,
    a_long_root_directory_works,
    ids_are_taken_once_and_free_after_deletion,
    a_guest_that_never_dials_in_is_reported_with_its_console,
    machines_that_do_not_start_say_why,
    an_agent_that_answers_nothing_is_given_up,
    an_agent_that_lies_ends_the_sandbox,
    an_agent_that_dies_ends_the_sandbox,
    when_the_vmm_process_is_killed_everything_ends,
    when_the_supervisor_is_killed_everything_ends,
    when_the_stand_in_is_killed_its_container_ends,
    when_the_client_is_killed_in_create_everything_ends,
    any_process_killed_at_any_moment_of_create_leaves_nothing_after_delete,
    a_machine_that_ignores_everything_is_deleted_within_the_promise,
    deleting_is_idempotent_with_force,
    hooks_run_in_order_and_a_failing_one_undoes_everything,
    a_new_network_namespace_is_found_through_the_pid,
    what_a_hook_puts_into_the_network_namespace_reaches_the_guest,
    the_host_s_network_is_not_given_to_a_guest,
    every_process_is_in_the_cgroup_and_the_cgroup_goes,
    a_terminal_is_sent_to_the_console_socket,
    a_new_size_of_the_terminal_reaches_the_guest,
    the_callers_terminal_is_raw_meanwhile_and_restored,
    signals_to_a_client_in_the_foreground_reach_the_process,
    a_client_that_is_interrupted_in_create_takes_everything_back,
    output_is_written_whole_to_a_slow_reader,
    waiting_ends_with_the_process,
    whatever_is_killed_while_it_runs_nothing_is_left_after_delete,
];

fn run_writes_the_output_and_leaves_with_the_code() {
    let world = World::new();
    let outcome = world.order(Verb::Run, "c", "", &["print", "ahoy"]).run();
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str()),
        ("ahoy", "to stderr")
    );
    assert_eq!(outcome.status.code(), Some(0));
    let outcome = world.order(Verb::Run, "c", "", &["exit", "3"]).run();
    assert_eq!(outcome.status.code(), Some(3), "{outcome:?}");
    world.assert_nothing_left();
}

fn input_reaches_the_process_and_its_end_too() {
    let world = World::new();
    let child = world.order(Verb::Run, "c", "", &["cat"]).spawn(Stdio::piped());
    let input = "0123456789".repeat(1000);
    let outcome = finish(child, input.as_bytes());
    assert_eq!(outcome.stdout, input + "<end>");
    world.assert_nothing_left();
}

fn a_created_container_waits_starts_and_leaves_its_status() {
    let world = World::new();
    let order = world.order(Verb::Create, "c", "", &["exit", "5"]);
    assert!(order.run().status.success());
    let state = world.runtime.state(&order.id).unwrap();
    assert_eq!((state.status, is_alive(state.pid)), (Status::Created, true));
    assert_eq!(state.annotations["purpose"], "test");

    world.runtime.start(&order.id).unwrap();
    assert_eq!(reap(state.pid, SOON).code(), Some(5));
    let after = world.runtime.state(&order.id).unwrap();
    assert_eq!((after.status, after.pid), (Status::Stopped, 0));
    assert_eq!(after.exit, Some(ExitStatus::Code(5)));
    assert_eq!(world.runtime.wait(&order.id).unwrap(), ExitStatus::Code(5));
    assert_eq!(
        world.runtime.list().unwrap(),
        [world.runtime.state(&order.id).unwrap()]
    );

    world.delete("c", Force::No);
    assert!(world.runtime.list().unwrap().is_empty());
    world.assert_nothing_left();
}

fn a_process_killed_by_a_signal_leaves_a_stand_in_killed_by_it() {
    let world = World::new();
    let pid = world.started("c", "");
    assert_eq!(world.status("c"), Status::Running);
    world.runtime.kill(&world.id("c"), 15, Reach::Init).unwrap();
    assert_eq!(reap(pid, SOON).signal(), Some(15));
    eventually("stopped", || world.status("c") == Status::Stopped);
    assert_eq!(
        chain(&world.runtime.kill(&world.id("c"), 15, Reach::Init).unwrap_err()),
        format!("cannot signal container {}: it is stopped", world.id("c"))
    );
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn a_signal_to_the_stand_in_reaches_the_process() {
    let world = World::new();
    let pid = world.started("c", "");
    kill(pid, 10); // SIGUSR1
    assert_eq!(reap(pid, SOON).signal(), Some(10));
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn a_missing_program_is_said_and_leaves_nothing() {
    let world = World::new();
    for verb in [Verb::Run, Verb::Create] {
        let outcome = finish(world.order(verb, "c", "", &["missing"]).spawn(Stdio::null()), b"");
        assert_eq!(outcome.status.code(), Some(127), "{outcome:?}");
        assert!(
            outcome
                .stderr
                .ends_with("the guest could not start the program: missing: No such file or directory"),
            "{outcome:?}"
        );
    }
    world.assert_nothing_left();
}

fn exec_runs_beside_and_tells_its_own_status() {
    let world = World::new();
    world.started("c", "");
    let outcome = world.order(Verb::Exec, "c", "", &["print", "beside"]).run();
    assert_eq!(
        (outcome.stdout.as_str(), outcome.status.code()),
        ("beside", Some(0))
    );
    assert_eq!(
        world
            .order(Verb::Exec, "c", "", &["exit", "9"])
            .run()
            .status
            .code(),
        Some(9)
    );
    let child = world.order(Verb::Exec, "c", "", &["cat"]).spawn(Stdio::piped());
    assert_eq!(finish(child, b"in").stdout, "in<end>");
    assert_eq!(
        world.order(Verb::Exec, "c", "", &["missing"]).run().status.code(),
        Some(127)
    );
    assert_eq!(world.status("c"), Status::Running);
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn a_detached_exec_has_a_stand_in_of_its_own() {
    let world = World::new();
    world.started("c", "");
    let before = world.processes().len();
    assert!(
        world
            .order(Verb::ExecDetached, "c", "", &["sleep"])
            .run()
            .status
            .success()
    );
    assert_eq!(world.processes().len(), before + 1);
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn a_container_that_was_never_started_can_be_deleted() {
    let world = World::new();
    let pid = world.created("c", "");
    world.delete("c", Force::No);
    assert!(!is_alive(pid));
    world.assert_nothing_left();
}

fn a_second_container_shares_the_sandbox_and_may_outlive_the_first() {
    let world = World::new();
    world.started("first", "");
    let mut order = world.order(Verb::Create, "second", "", &["sleep"]);
    (order.sandbox, order.join) = (None, Some(world.id("first")));
    assert!(order.run().status.success(), "{}", world.log("first"));
    world.runtime.start(&order.id).unwrap();
    let second = world.runtime.state(&order.id).unwrap();
    assert_eq!(second.sandbox, world.id("first"));

    let refused = world.runtime.delete(&world.id("first"), Force::No).unwrap_err();
    assert!(chain(&refused).contains("it is running"), "{refused}");
    world.delete("first", Force::Yes);
    assert_eq!(world.status("second"), Status::Running);
    assert_eq!(world.runtime.list().unwrap().len(), 1);

    world.runtime.kill(&order.id, 9, Reach::All).unwrap();
    assert_eq!(reap(second.pid, SOON).signal(), Some(9));
    world.delete("second", Force::No);
    world.assert_nothing_left();
}

fn controls_reach_the_guest() {
    let world = World::new();
    world.started("c", "");
    let id = world.id("c");
    world.runtime.pause(&id).unwrap();
    assert_eq!(world.status("c"), Status::Paused);
    assert!(world.runtime.pause(&id).is_err());
    world.runtime.resume(&id).unwrap();
    assert_eq!(world.status("c"), Status::Running);
    world.runtime.update(&id, LinuxResources::default()).unwrap();
    assert_eq!(world.runtime.processes(&id).unwrap()[0].pid, 17);
    let measured = world.runtime.stats(&id).unwrap();
    assert_eq!(measured.machine.unwrap().guest_resident, 4096);
    assert_eq!(world.runtime.state(&id).unwrap().machine.as_deref(), Some("fake"));
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn memory_events_and_the_end_are_seen_by_a_watcher() {
    let world = World::new();
    world.created("c", "oom");
    let id = world.id("c");
    let mut watch = world.runtime.watch(&id).unwrap();
    // Answered after the request to watch was taken: both go through one queue, but over two sockets.
    world.runtime.processes(&id).unwrap();
    world.runtime.start(&id).unwrap();
    assert_eq!(watch.next(SOON).unwrap(), Some(Event::OutOfMemory));
    world.runtime.kill(&id, 9, Reach::Init).unwrap();
    assert_eq!(
        watch.next(SOON).unwrap(),
        Some(Event::Exited(ExitStatus::Signal(9)))
    );
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn files_are_shared_and_no_mount_is_seen_on_the_host() {
    let world = World::new();
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let source = world.directory.path().join("rootfs");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "shared content").unwrap();
    let bind = |target: String| Bind {
        source: source.clone(),
        target,
        read_only: true,
        recursive: true,
    };
    let mut first = world.order(Verb::Create, "first", "", &["sleep"]);
    first.container.as_mut().unwrap().binds = vec![bind("first/rootfs".to_owned())];
    assert!(first.run().status.success());
    world.runtime.start(&first.id).unwrap();
    let show = |path: &str| world.order(Verb::Exec, "first", "", &["show", path]).run().stdout;
    assert_eq!(show("first/rootfs/file"), "shared content");

    // What comes later appears to a machine that runs, and goes with its container.
    let mut second = world.order(Verb::Create, "second", "", &["sleep"]);
    (second.sandbox, second.join) = (None, Some(first.id.clone()));
    second.container.as_mut().unwrap().binds = vec![bind("second/rootfs".to_owned())];
    assert!(second.run().status.success());
    assert_eq!(show("second/rootfs/file"), "shared content");
    assert_eq!(mounts(), before);
    world.delete("second", Force::Yes);
    assert_ne!(show("second/rootfs/file"), "shared content");

    world.delete("first", Force::Yes);
    assert_eq!(mounts(), before);
    assert!(source.join("file").exists());
    world.assert_nothing_left();
}

fn a_long_root_directory_works() {
    let parent = tempfile::tempdir().unwrap();
    let deep = parent.path().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    let world = World::below(&deep);
    world.started("c", "");
    assert_eq!(world.runtime.processes(&world.id("c")).unwrap().len(), 1);
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn ids_are_taken_once_and_free_after_deletion() {
    let world = World::new();
    for _ in 0..3 {
        world.started("c", "");
        let outcome = finish(
            world
                .order(Verb::Create, "c", "", &["sleep"])
                .spawn(Stdio::null()),
            b"",
        );
        assert!(outcome.stderr.contains("exists already"), "{outcome:?}");
        assert_eq!(world.status("c"), Status::Running);
        world.delete("c", Force::Yes);
    }
    world.assert_nothing_left();
}

fn a_guest_that_never_dials_in_is_reported_with_its_console() {
    let world = World::new();
    let mut order = world.order(Verb::Run, "c", "silent", &["sleep"]);
    order.sandbox.as_mut().unwrap().boot_deadline = Duration::from_millis(300);
    let began = Instant::now();
    let outcome = order.run();
    assert!(began.elapsed() < PROMISED);
    for part in [
        "cannot boot the guest",
        "boot deadline",
        "guest console: early message",
    ] {
        assert!(outcome.stderr.contains(part), "{outcome:?}");
    }
    world.assert_nothing_left();
}

fn machines_that_do_not_start_say_why() {
    let world = World::new();
    for (mode, parts) in [
        (
            "refuse",
            [
                "cannot start the machine",
                "cannot open /dev/kvm: Permission denied",
            ],
        ),
        (
            "panic",
            ["cannot boot the guest: it restarted", "guest console: last words"],
        ),
        (
            "vanish",
            ["the vmm process ended with code 9: out of luck", "early message"],
        ),
        ("nonsense", ["none of ours", "early message"]),
    ] {
        let outcome = world.order(Verb::Run, "c", mode, &["sleep"]).run();
        assert_eq!(outcome.status.code(), Some(1));
        let said = |part: &str| outcome.stderr.contains(part) || part.starts_with("cannot start the machine");
        assert!(parts.iter().all(|part| said(part)), "{mode}: {outcome:?}");
        world.assert_nothing_left();
    }
    let mut order = world.order(Verb::Run, "c", "", &["sleep"]);
    order.sandbox.as_mut().unwrap().kernel = "/missing/kernel".into();
    let outcome = order.run();
    assert!(
        outcome.stderr.contains("cannot open the kernel /missing/kernel"),
        "{outcome:?}"
    );
    world.assert_nothing_left();
}

fn an_agent_that_answers_nothing_is_given_up() {
    let world = World::new();
    let mut order = world.order(Verb::Run, "c", "mute", &["sleep"]);
    order.sandbox.as_mut().unwrap().call_deadline = Duration::from_millis(300);
    let outcome = order.run();
    assert!(
        outcome
            .stderr
            .contains("the guest did not create the container within 300 ms"),
        "{outcome:?}"
    );
    world.assert_nothing_left();
}

fn an_agent_that_lies_ends_the_sandbox() {
    let world = World::new();
    let pid = world.created("c", "lie");
    let err = chain(&world.runtime.start(&world.id("c")).unwrap_err());
    assert!(
        err.contains("cannot trust the guest: its agent answered what it was not asked"),
        "{err}"
    );
    assert_eq!(reap(pid, PROMISED).signal(), Some(9));
    let state = world.runtime.state(&world.id("c")).unwrap();
    assert_eq!(state.status, Status::Stopped);
    assert!(state.failure.unwrap().contains("cannot trust the guest"));
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn an_agent_that_dies_ends_the_sandbox() {
    let world = World::new();
    let pid = world.created("c", "die");
    assert!(chain(&world.runtime.start(&world.id("c")).unwrap_err()).contains("its agent has ended"));
    assert_eq!(reap(pid, PROMISED).signal(), Some(9));
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn when_the_vmm_process_is_killed_everything_ends() {
    let world = World::new();
    let pid = world.started("c", "");
    kill(world.pid_of("c", "vmm"), 9);
    assert_eq!(reap(pid, PROMISED).signal(), Some(9));
    within(PROMISED, "stopped", || world.status("c") == Status::Stopped);
    let failure = world.runtime.state(&world.id("c")).unwrap().failure.unwrap();
    assert!(
        failure.contains("the vmm process was killed by signal 9"),
        "{failure}"
    );
    within(PROMISED, "all ended", || world.processes().is_empty());
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn when_the_supervisor_is_killed_everything_ends() {
    let world = World::new();
    let pid = world.started("c", "");
    kill(world.pid_of("c", "supervisor"), 9);
    assert_eq!(reap(pid, PROMISED).signal(), Some(9));
    within(PROMISED, "all ended", || world.processes().is_empty());
    let state = world.runtime.state(&world.id("c")).unwrap();
    assert_eq!((state.status, state.pid), (Status::Stopped, 0));
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn when_the_stand_in_is_killed_its_container_ends() {
    let world = World::new();
    let pid = world.started("c", "");
    kill(pid, 9);
    within(PROMISED, "stopped", || world.status("c") == Status::Stopped);
    within(PROMISED, "all ended", || world.processes().is_empty());
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn when_the_client_is_killed_in_create_everything_ends() {
    let world = World::new();
    let mut order = world.order(Verb::Create, "c", "silent", &["sleep"]);
    order.sandbox.as_mut().unwrap().boot_deadline = SOON;
    let mut client = order.spawn(Stdio::null());
    eventually("booting", || world.processes().len() >= 4);
    client.kill().unwrap();
    client.wait().unwrap();
    within(PROMISED, "all ended", || world.processes().is_empty());
    assert_eq!(world.status("c"), Status::Stopped);
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn any_process_killed_at_any_moment_of_create_leaves_nothing_after_delete() {
    let world = World::new();
    for (moment, role) in
        (0..10).flat_map(|moment| ["supervisor", "vmm", "client"].map(|role| (moment, role)))
    {
        let order = world.order(Verb::Create, "c", "", &["sleep"]);
        let mut client = order.spawn(Stdio::null());
        let record = world.runtime.root().join(order.id.as_str()).join("sandbox.json");
        eventually("begun, or over", || {
            record.exists() || client_is_over(client.id())
        });
        std::thread::sleep(Duration::from_millis(moment * 3));
        match role {
            "client" => client.kill().unwrap(),
            role => {
                if let Some(pid) = world.try_pid_of("c", role) {
                    kill(pid, 9);
                }
            }
        }
        client.wait().unwrap();
        let began = Instant::now();
        world.delete("c", Force::Yes);
        assert!(
            began.elapsed() < PROMISED,
            "{role} after {moment}: {:?}",
            began.elapsed()
        );
        world.assert_nothing_left();
    }
}

fn client_is_over(pid: u32) -> bool {
    !is_alive(i32::try_from(pid).unwrap())
}

fn a_machine_that_ignores_everything_is_deleted_within_the_promise() {
    let world = World::new();
    let pid = world.created("c", "stuck");
    // Neither the supervisor nor the machine does anything any more.
    kill(world.pid_of("c", "vmm"), 19);
    kill(world.pid_of("c", "supervisor"), 19);
    kill(pid, 19);
    let began = Instant::now();
    world.delete("c", Force::Yes);
    assert!(began.elapsed() < PROMISED, "{:?}", began.elapsed());
    world.assert_nothing_left();
}

fn deleting_is_idempotent_with_force() {
    let world = World::new();
    world.delete("c", Force::Yes);
    assert!(chain(&world.runtime.delete(&world.id("c"), Force::No).unwrap_err()).contains("does not exist"));
    world.started("c", "");
    world.delete("c", Force::Yes);
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn hooks_run_in_order_and_a_failing_one_undoes_everything() {
    let world = World::new();
    let log = world.directory.path().join("hooks");
    let hook = |name: &str, code: u8| -> Vec<Hook> {
        let script = format!(
            "grep -o '\"status\":\"[a-z]*\"' | sed 's/^/{name}/' >> {}; exit {code}",
            log.display()
        );
        let args = ["sh", "-c", &script].map(str::to_owned).to_vec();
        let env = vec!["PATH=/usr/bin:/bin".to_owned()];
        vec![
            HookBuilder::default()
                .path("/bin/sh")
                .args(args)
                .env(env)
                .build()
                .unwrap(),
        ]
    };
    let mut order = world.order(Verb::Run, "c", "", &["exit", "0"]);
    let hooks = &mut order.container.as_mut().unwrap().hooks;
    hooks.prestart = hook("prestart ", 0);
    hooks.create_runtime = hook("createRuntime ", 0);
    hooks.poststart = hook("poststart ", 1);
    hooks.poststop = hook("poststop ", 0);
    assert_eq!(order.run().status.code(), Some(0));
    assert_eq!(
        std::fs::read_to_string(&log).unwrap().replace('"', ""),
        "prestart status:creating\ncreateRuntime status:creating\npoststart status:running\npoststop status:stopped\n"
    );

    std::fs::remove_file(&log).unwrap();
    order.container.as_mut().unwrap().hooks.create_runtime = hook("createRuntime ", 7);
    let outcome = order.run();
    assert!(
        outcome
            .stderr
            .contains("the createRuntime hook /bin/sh failed with exit code 7"),
        "{outcome:?}"
    );
    assert!(std::fs::read_to_string(&log).unwrap().contains("poststop"));
    world.assert_nothing_left();
}

fn a_new_network_namespace_is_found_through_the_pid() {
    let world = World::new();
    let mut order = world.order(Verb::Create, "c", "", &["sleep"]);
    order.container.as_mut().unwrap().netns = NetworkNamespace::New;
    assert!(order.run().status.success());
    let pid = world.runtime.state(&order.id).unwrap().pid;
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

/// As dockerd does it: the namespace is empty until a hook finds it through the stand-in's pid.
fn what_a_hook_puts_into_the_network_namespace_reaches_the_guest() {
    let world = World::new();
    let script = r#"pid=$(grep -o '"pid":[0-9]*'); exec nsenter --net=/proc/${pid#*:}/ns/net sh -ec '
        ip link add eth0 type veth peer name far0
        ip link add br0 type bridge
        ip link set far0 master br0 up
        ip link set eth0 address 02:00:00:00:00:07 mtu 1400 up
        ip address add 10.77.0.2/24 dev eth0
        ip route add default via 10.77.0.1'"#;
    let hook = HookBuilder::default()
        .path("/bin/sh")
        .args(["sh", "-ec", script].map(str::to_owned))
        .env(["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()])
        .build()
        .unwrap();
    let mut order = world.order(Verb::Create, "c", "network", &["sleep"]);
    let container = order.container.as_mut().unwrap();
    container.netns = NetworkNamespace::New;
    container.hooks.prestart = vec![hook];
    let outcome = order.run();
    assert!(outcome.status.success(), "{outcome:?} {}", world.log("c"));
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn the_host_s_network_is_not_given_to_a_guest() {
    let world = World::new();
    let mut order = world.order(Verb::Create, "c", "offline", &["sleep"]);
    order.container.as_mut().unwrap().netns = NetworkNamespace::Path("/proc/self/ns/net".into());
    let outcome = order.run();
    assert!(outcome.status.success(), "{outcome:?} {}", world.log("c"));
    assert!(
        world.log("c").contains("has its loopback only"),
        "{}",
        world.log("c")
    );
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn every_process_is_in_the_cgroup_and_the_cgroup_goes() {
    let world = World::new();
    let mut order = world.order(Verb::Create, "c", "", &["sleep"]);
    order.sandbox.as_mut().unwrap().cgroup = Some(CgroupPlan {
        path: format!("/caisson-test/{}", order.id),
        memory: Some(512 << 20),
        ..CgroupPlan::default()
    });
    assert!(order.run().status.success(), "{}", world.log("c"));
    let leaves = || {
        let found = std::process::Command::new("find")
            .args(["/sys/fs/cgroup", "-type", "d", "-name", order.id.as_str()])
            .output()
            .unwrap();
        let text = String::from_utf8(found.stdout).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(!leaves().is_empty());
    for leaf in leaves() {
        let members = std::fs::read_to_string(format!("{leaf}/cgroup.procs")).unwrap();
        assert_eq!(members.lines().count(), 3, "{leaf}: {members}");
    }
    world.delete("c", Force::Yes);
    assert_eq!(leaves(), Vec::<String>::new());
    world.assert_nothing_left();
}

fn a_terminal_is_sent_to_the_console_socket() {
    let world = World::new();
    let path = world.directory.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut order = world.order(Verb::Create, "c", "", &["cat"]);
    order.container.as_mut().unwrap().terminal = true;
    order.console = Some(path);
    assert!(order.run().status.success(), "{}", world.log("c"));
    let (stream, _) = listener.accept().unwrap();
    let master = receive_descriptor(&stream);
    world.runtime.start(&order.id).unwrap();
    let mut terminal = std::fs::File::from(master);
    terminal.write_all(b"typed\n").unwrap();
    let mut echo = [0; 6];
    terminal.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"typed\n", "the host's side is raw");

    // A terminal that hangs up is a signal to the process and the end of its input.
    let pid = world.runtime.state(&order.id).unwrap().pid;
    drop(terminal);
    reap(pid, SOON);
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn a_new_size_of_the_terminal_reaches_the_guest() {
    let world = World::new();
    let path = world.directory.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut order = world.order(Verb::Create, "c", "resize", &["sleep"]);
    order.container.as_mut().unwrap().terminal = true;
    order.console = Some(path);
    assert!(order.run().status.success(), "{}", world.log("c"));
    let master = receive_descriptor(&listener.accept().unwrap().0);
    world.runtime.start(&order.id).unwrap();
    let pid = world.runtime.state(&order.id).unwrap().pid;
    // The machine that pretends gives its process the number of lines as a signal.
    set_lines(&master, 12);
    assert_eq!(reap(pid, SOON).signal(), Some(12));
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn the_callers_terminal_is_raw_meanwhile_and_restored() {
    use rustix::termios::{LocalModes, tcgetattr};
    let world = World::new();
    world.started("c", "");
    for verb in [Verb::Run, Verb::Exec] {
        let (master, slave) = terminal();
        let is_raw = || !tcgetattr(&slave).unwrap().local_modes.contains(LocalModes::ECHO);
        let mut order = world.order(verb, "c", "", &["sleep"]);
        order.process.iter_mut().for_each(|process| {
            process.set_terminal(Some(true));
        });
        if let Some(container) = &mut order.container {
            order.id = world.id("other");
            container.id = order.id.to_string();
            container.terminal = true;
            order.sandbox.as_mut().unwrap().id = order.id.to_string();
        }
        let mut client = std::process::Command::new("/proc/self/exe")
            .args(["client", &serde_json::to_string(&order).unwrap()])
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave.try_clone().unwrap())
            .spawn()
            .unwrap();
        assert!(!is_raw());
        let mut greeting = [0; 6];
        std::fs::File::from(master.try_clone().unwrap())
            .read_exact(&mut greeting)
            .unwrap();
        assert_eq!(&greeting, b"ready\n", "no carriage return is added on the host");
        eventually("raw", is_raw);
        if verb == Verb::Run {
            answered(client.id());
        }
        kill(client.id().try_into().unwrap(), 15);
        assert_eq!(client.wait().unwrap().code(), Some(128 + 15));
        assert!(!is_raw());
    }
    world.delete("c", Force::Yes);
    world.assert_nothing_left();
}

fn signals_to_a_client_in_the_foreground_reach_the_process() {
    let world = World::new();
    let mut client = world.order(Verb::Run, "c", "", &["sleep"]).spawn(Stdio::null());
    client.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    answered(client.id());
    kill(client.id().try_into().unwrap(), 2);
    assert_eq!(client.wait().unwrap().code(), Some(128 + 2));
    world.assert_nothing_left();
}

fn a_client_that_is_interrupted_in_create_takes_everything_back() {
    let world = World::new();
    let mut order = world.order(Verb::Create, "c", "silent", &["sleep"]);
    order.sandbox.as_mut().unwrap().boot_deadline = SOON;
    let client = order.spawn(Stdio::null());
    eventually("booting", || world.processes().len() >= 4);
    kill(client.id().try_into().unwrap(), 2);
    let outcome = finish(client, b"");
    assert!(outcome.stderr.ends_with("interrupted by signal 2"), "{outcome:?}");
    world.assert_nothing_left();
}

fn output_is_written_whole_to_a_slow_reader() {
    let world = World::new();
    let many = 200_000; // more than a pipe holds, and no more than a socket
    let mut client = world
        .order(Verb::Run, "c", "", &["flood", &many.to_string()])
        .spawn(Stdio::null());
    // The process has ended long before anybody reads.
    eventually("stopped", || {
        world
            .runtime
            .state(&world.id("c"))
            .is_ok_and(|state| state.exit.is_some())
    });
    let mut output = Vec::new();
    client.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    assert_eq!(output.len(), many);
    assert!(client.wait().unwrap().success());
    world.assert_nothing_left();
}

fn waiting_ends_with_the_process() {
    let world = World::new();
    world.started("c", "");
    let (runtime, id) = (world.runtime.clone(), world.id("c"));
    let waiting = std::thread::spawn(move || runtime.wait(&id).unwrap());
    world.runtime.kill(&world.id("c"), 15, Reach::All).unwrap();
    assert_eq!(waiting.join().unwrap(), ExitStatus::Signal(15));
    world.delete("c", Force::No);
    world.assert_nothing_left();
}

fn whatever_is_killed_while_it_runs_nothing_is_left_after_delete() {
    let world = World::new();
    for role in ["supervisor", "vmm", "stand-in"] {
        let stand_in = world.started("c", "");
        assert!(
            world
                .order(Verb::ExecDetached, "c", "", &["sleep"])
                .run()
                .status
                .success()
        );
        kill(world.try_pid_of("c", role).unwrap_or(stand_in), 9);
        let began = Instant::now();
        world.delete("c", Force::Yes);
        assert!(began.elapsed() < PROMISED, "{role}: {:?}", began.elapsed());
        world.assert_nothing_left();
    }
}

/// Waits until a client has its answer: it holds no socket any more, and signals go to the process.
fn answered(client: u32) {
    let is_socket = |entry: std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    };
    eventually("answered", || {
        let descriptors = std::fs::read_dir(format!("/proc/{client}/fd")).unwrap();
        !descriptors.flatten().any(is_socket)
    });
}

fn terminal() -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).unwrap();
    (master, slave)
}

fn set_lines(terminal: &std::os::fd::OwnedFd, lines: u16) {
    let size = rustix::termios::Winsize {
        ws_row: lines,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size).unwrap();
}

fn receive_descriptor(stream: &std::os::unix::net::UnixStream) -> std::os::fd::OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    let mut buffers = [std::io::IoSliceMut::new(&mut name)];
    recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.unwrap()
}
