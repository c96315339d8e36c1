//! Whatever is killed, `delete` works and nothing is left.

use std::time::Instant;

use rustix::process::Signal;

use crate::world::{PROMISED, World, child_with_word, eventually, kill, processes_naming};

/// The supervisor of the one sandbox of a world.
fn supervisor(world: &World) -> i32 {
    let root = world.root();
    let found = processes_naming(root.to_str().unwrap());
    *found
        .first()
        .expect("a supervisor has the root on its command line")
}

fn delete_in_time(world: &World) {
    let began = Instant::now();
    world.ok(&["delete", "--force", "c"]);
    assert!(began.elapsed() < PROMISED, "delete took {:?}", began.elapsed());
    world.assert_nothing_left();
}

#[test]
fn a_killed_vmm_process_stops_the_container() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    let vmm = child_with_word(supervisor(&world), "vmm").expect("the supervisor has a vmm process");
    kill(vmm, Signal::KILL);
    world.await_status("c", "stopped");
    let refused = world.run(&["exec", "c", "true"]);
    assert!(!refused.status.success(), "{refused:?}");
    delete_in_time(&world);
    eventually("the vmm process has gone", || {
        !std::fs::exists(format!("/proc/{vmm}")).unwrap()
    });
}

#[test]
fn a_killed_supervisor_stops_the_container() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    let supervisor = supervisor(&world);
    let vmm = child_with_word(supervisor, "vmm").expect("the supervisor has a vmm process");
    kill(supervisor, Signal::KILL);
    world.await_status("c", "stopped");
    delete_in_time(&world);
    eventually("the vmm process has gone", || {
        !std::fs::exists(format!("/proc/{vmm}")).unwrap()
    });
}

#[test]
fn a_killed_stand_in_stops_the_container() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    let pid = i32::try_from(world.state("c")["pid"].as_i64().unwrap()).unwrap();
    kill(pid, Signal::KILL);
    world.await_status("c", "stopped");
    delete_in_time(&world);
}
