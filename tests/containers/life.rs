//! Create, start, exec, signals, pause, delete.

use serde_json::{Value, json};

use crate::world::{World, eventually};

#[test]
fn a_container_prints_and_leaves_with_its_code() {
    let world = World::new();
    let outcome = world.run_script("echo out; echo err >&2; exit 3", |_| {});
    assert_eq!(outcome.stdout, "out\n", "{outcome:?}");
    assert!(outcome.stderr.ends_with("err\n"), "{outcome:?}");
    assert_eq!(outcome.status.code(), Some(3));
    world.assert_nothing_left();
}

#[test]
fn a_container_has_a_kernel_of_its_own() {
    let world = World::new();
    let outcome = world.run_script(
        "cat /proc/sys/kernel/random/boot_id; readlink /proc/1/exe; hostname",
        |_| {},
    );
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{outcome:?}");
    assert_ne!(lines[0], host.trim());
    assert_eq!(lines[1..], ["/bin/busybox", "caisson"]);
}

#[test]
fn created_started_killed_deleted() {
    let world = World::new();
    let bundle = world.bundle(
        "c",
        "trap 'exit 7' TERM; touch /tmp/ready; while :; do sleep 1 & wait $!; done",
        |config| {
            config["annotations"] = json!({ "org.example.kept": "yes" });
        },
    );
    let pid_file = world.directory.path().join("pid");
    world.ok(&[
        "create",
        "--bundle",
        &bundle,
        "--pid-file",
        pid_file.to_str().unwrap(),
        "c",
    ]);
    let state = world.state("c");
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], "c");
    assert_eq!(state["bundle"], bundle.as_str());
    assert_eq!(state["annotations"]["org.example.kept"], "yes");
    let pid = std::fs::read_to_string(pid_file).unwrap();
    assert_eq!(state["pid"].to_string(), pid.trim());
    assert!(world.ok(&["list"]).contains("created"));

    world.ok(&["start", "c"]);
    assert_eq!(world.state("c")["status"], "running");
    let refused = world.run(&["delete", "c"]);
    assert!(
        !refused.status.success() && refused.stderr.contains("running"),
        "{refused:?}"
    );
    let ready = world.directory.path().join("c/rootfs/tmp/ready");
    eventually("it takes signals", || ready.exists());
    world.ok(&["kill", "c", "TERM"]);
    world.await_status("c", "stopped");
    let refused = world.run(&["kill", "c", "KILL"]);
    assert!(!refused.status.success(), "{refused:?}");
    world.ok(&["delete", "c"]);
    let gone = world.run(&["state", "c"]);
    assert!(gone.stderr.contains("does not exist"), "{gone:?}");
    world.ok(&["delete", "--force", "c"]);
    world.assert_nothing_left();
}

#[test]
fn exec_enters_the_guest() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let inside = world.ok(&["exec", "c", "sh", "-c", boot_id]);
    assert_ne!(
        inside,
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap()
    );
    assert_eq!(inside, world.ok(&["exec", "c", "sh", "-c", boot_id]));
    let outcome = world.run(&[
        "exec",
        "--env",
        "A=b c",
        "--cwd",
        "/tmp",
        "--user",
        "1000:1000",
        "c",
        "sh",
        "-c",
        "echo \"$A\"; pwd; id -u; id -g; exit 5",
    ]);
    assert_eq!(outcome.stdout, "b c\n/tmp\n1000\n1000\n", "{outcome:?}");
    assert_eq!(outcome.status.code(), Some(5));
    let missing = world.run(&["exec", "c", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127), "{missing:?}");
    assert!(missing.stderr.contains("no-such-program"), "{missing:?}");
    world.ok(&["delete", "--force", "c"]);
    world.assert_nothing_left();
}

#[test]
fn pause_freezes_and_resume_goes_on() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    world.ok(&[
        "exec",
        "--detach",
        "c",
        "sh",
        "-c",
        "while :; do echo x >> /tmp/ticks; sleep 0.05; done",
    ]);
    let ticks = world.directory.path().join("c/rootfs/tmp/ticks");
    let count = || std::fs::metadata(&ticks).map_or(0, |file| file.len());
    eventually("it ticks", || count() > 4);
    world.ok(&["pause", "c"]);
    assert_eq!(world.state("c")["status"], "paused");
    let frozen = count();
    std::thread::park_timeout(std::time::Duration::from_millis(500));
    assert_eq!(count(), frozen);
    let refused = world.run(&["exec", "c", "true"]);
    assert!(!refused.status.success(), "{refused:?}");
    world.ok(&["resume", "c"]);
    eventually("it ticks again", || count() > frozen);
    world.ok(&["delete", "--force", "c"]);
    world.assert_nothing_left();
}

#[test]
fn processes_and_numbers_are_those_of_the_guest() {
    let world = World::new();
    world.start_sleeper("c", |config| {
        config["linux"]["resources"]["pids"] = json!({ "limit": 77 });
    });
    let table = world.ok(&["ps", "c"]);
    assert!(table.contains("sleep 1"), "{table}");
    let pids: Value = serde_json::from_str(&world.ok(&["ps", "--format", "json", "c"])).unwrap();
    assert!(pids.as_array().unwrap().len() >= 2, "{pids}");
    let stats: Value = serde_json::from_str(world.ok(&["events", "--stats", "c"]).trim()).unwrap();
    assert_eq!(stats["type"], "stats");
    assert_eq!(stats["data"]["pids"]["limit"], 77, "{stats}");
    assert!(
        stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0,
        "{stats}"
    );
    world.ok(&["update", "--pids-limit", "55", "c"]);
    let stats: Value = serde_json::from_str(world.ok(&["events", "--stats", "c"]).trim()).unwrap();
    assert_eq!(stats["data"]["pids"]["limit"], 55, "{stats}");
    world.ok(&["delete", "--force", "c"]);
    world.assert_nothing_left();
}

#[test]
fn hooks_run_where_they_belong_with_the_state_on_stdin() {
    let world = World::new();
    let log = world.directory.path().join("hooks");
    let on_host = |name: &str| {
        let script = format!(
            "cat > {}/{name}; cat /proc/sys/kernel/random/boot_id >> {0}/{name}",
            log.display()
        );
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
    };
    let in_guest = |name: &str| {
        let script = format!("cat > /tmp/{name}; cat /proc/sys/kernel/random/boot_id >> /tmp/{name}");
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] }])
    };
    std::fs::create_dir(&log).unwrap();
    let outcome = world.run_script("echo; cat /tmp/startContainer", |config| {
        config["hooks"] = json!({
            "createRuntime": on_host("createRuntime"),
            "startContainer": in_guest("startContainer"),
            "poststart": on_host("poststart"),
            "poststop": on_host("poststop"),
        });
    });
    assert!(outcome.status.success(), "{outcome:?}");
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for (name, status) in [
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ] {
        let seen = std::fs::read_to_string(log.join(name)).unwrap_or_else(|err| panic!("{name}: {err}"));
        assert!(seen.ends_with(&host), "{name} ran elsewhere: {seen}");
        let state: Value = serde_json::from_str(seen.strip_suffix(&host).unwrap()).unwrap();
        assert_eq!(
            (&state["id"], &state["status"]),
            (&json!("c"), &json!(status)),
            "{name}"
        );
    }
    assert!(
        outcome.stdout.contains("\"id\":\"c\"") && !outcome.stdout.contains(&host),
        "{outcome:?}"
    );
}

#[test]
fn several_run_at_once_and_nothing_is_left() {
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|number| {
                scope.spawn(move || {
                    let world = World::new();
                    let outcome = world.run_script(&format!("exit {number}"), |_| {});
                    assert_eq!(outcome.status.code(), Some(number), "{outcome:?}");
                    world.assert_nothing_left();
                })
            })
            .collect();
        for run in runs {
            run.join().unwrap();
        }
    });
}

#[test]
fn a_root_directory_and_a_command_are_enough() {
    let world = World::new();
    let bundle = world.bundle("b", "true", |_| {});
    let rootfs = format!("{bundle}/rootfs");
    let outcome = world.run(&[
        "run",
        "--rootfs",
        &rootfs,
        "--",
        "sh",
        "-c",
        "echo $0 in $(pwd); exit 4",
        "me",
    ]);
    assert_eq!(outcome.stdout, "me in /\n", "{outcome:?}");
    assert_eq!(outcome.status.code(), Some(4));
    world.assert_nothing_left();
}
