//! What containers are promised.

use std::io::{Read, Write};

use caisson_wire::agent::{Call, ExitStatus, Reply, Stage, Target, WindowSize};
use serde_json::json;

use crate::guest::{Guest, process, shell, spec, text};

/// Every case by its name.
pub(crate) const ALL: &[(&str, fn())] = &[
    ("a_container_runs_and_its_code_is_reported", runs),
    ("input_reaches_the_program_and_ends", input),
    ("a_program_that_is_not_there_fails_at_create", missing_program),
    ("one_more_process_runs_in_the_container", exec),
    ("signals_reach_one_process_or_all", signals),
    ("a_terminal_is_the_controlling_one_and_can_be_resized", terminal),
    ("user_limits_and_capabilities_are_as_configured", credentials),
    ("mounts_are_as_configured", mounts),
    ("no_link_in_the_image_leads_a_mount_out", escaping_mounts),
    ("devices_are_the_default_ones_and_no_others_open", devices),
    ("a_container_joins_the_namespaces_of_another", joins),
    ("a_paused_container_does_nothing_until_it_is_resumed", pauses),
    (
        "the_system_call_filter_holds_with_and_without_no_new_privs",
        filters,
    ),
    ("hooks_run_in_their_order_and_a_failing_one_stops", hooks),
    ("a_slow_container_holds_up_no_other", concurrency),
    ("a_user_namespace_maps_ids", user_namespace),
    ("processes_and_usage_are_told", measures),
    ("requests_out_of_turn_are_refused", out_of_turn),
    (
        "a_container_that_was_never_started_can_be_killed_and_deleted",
        never_started,
    ),
    ("other_users_can_reopen_their_output", reopened_output),
];

fn runs() {
    let mut guest = Guest::new();
    let (out, err, status) = guest.run("one", spec(shell("echo $$; hostname; echo oops >&2; exit 7")));
    assert_eq!((out.as_str(), err.as_str()), ("1\ninside\n", "oops\n"));
    assert_eq!(status, ExitStatus::Code(7));
    guest.delete("one").unwrap();
    assert!(guest.cgroups().is_empty(), "the cgroup is left");
    guest.delete("one").unwrap();
    assert!(guest.unclaimed().is_empty(), "{:?}", guest.unclaimed());
}

fn input() {
    let mut guest = Guest::new();
    let mut streams = guest.create("one", spec(shell("cat; echo end"))).unwrap();
    guest.start("one").unwrap();
    streams.stdin.write_all(b"some text\n").unwrap();
    assert_eq!(streams.finish().0, "some text\nend\n");
    assert_eq!(guest.exited("one", None), ExitStatus::Code(0));
}

fn missing_program() {
    let mut guest = Guest::new();
    for (args, errno, words) in [
        (
            json!(["no-such"]),
            libc::ENOENT,
            "exec: \"no-such\": executable file not found in $PATH",
        ),
        (json!(["/no/such"]), libc::ENOENT, "no such file or directory"),
        (json!(["/etc/passwd"]), libc::EACCES, "permission denied"),
    ] {
        let mut config = shell("");
        config["process"]["args"] = args;
        let failed = guest.create("one", spec(config)).err().unwrap();
        assert_eq!(
            (failed.stage, failed.errno),
            (Stage::Program, Some(errno)),
            "{failed}"
        );
        assert!(failed.message.contains(words), "{failed}");
    }
    assert!(guest.cgroups().is_empty(), "a cgroup is left");
}

fn exec() {
    let mut guest = Guest::new();
    let streams = guest.create("one", spec(shell("echo up; sleep 60"))).unwrap();
    let early = guest
        .exec("one", "a", serde_json::from_value(process("true")).unwrap())
        .err()
        .unwrap();
    assert_eq!(early.stage, Stage::Request);
    guest.start("one").unwrap();
    let script = "hostname; cat /proc/1/comm; readlink /proc/self/ns/pid >/dev/null && cat; exit 3";
    let mut more = guest
        .exec("one", "a", serde_json::from_value(process(script)).unwrap())
        .unwrap();
    more.stdin.write_all(b"typed\n").unwrap();
    assert_eq!(more.finish().0, "inside\nsleep\ntyped\n");
    assert_eq!(guest.exited("one", Some("a")), ExitStatus::Code(3));

    let failed = guest
        .exec(
            "one",
            "b",
            serde_json::from_value(json!({
                "user": {"uid": 0, "gid": 0}, "args": ["no-such"], "env": ["PATH=/bin"], "cwd": "/"
            }))
            .unwrap(),
        )
        .err()
        .unwrap();
    assert_eq!((failed.stage, failed.errno), (Stage::Program, Some(libc::ENOENT)));

    // The id is free again once the process has ended, and the end of the first takes all others along.
    let again = guest
        .exec("one", "a", serde_json::from_value(process("sleep 60")).unwrap())
        .unwrap();
    guest.signal("one", None, libc::SIGKILL, false).unwrap();
    assert_eq!(guest.exited("one", None), ExitStatus::Signal(libc::SIGKILL));
    assert_eq!(guest.exited("one", Some("a")), ExitStatus::Signal(libc::SIGKILL));
    assert_eq!(
        (streams.finish().0.as_str(), again.finish().0.as_str()),
        ("up\n", "")
    );
    guest.delete("one").unwrap();
    assert!(guest.unclaimed().is_empty(), "{:?}", guest.unclaimed());
}

fn signals() {
    let mut guest = Guest::new();
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut streams = guest.create("one", spec(shell(script))).unwrap();
    guest.start("one").unwrap();
    read_until(&mut streams.stdout, "ready\n");
    guest.signal("one", None, libc::SIGTERM, false).unwrap();
    assert_eq!(guest.exited("one", None), ExitStatus::Code(5));
    assert_eq!(streams.finish().0, "caught\n");
    let late = guest.signal("one", None, libc::SIGTERM, false).unwrap_err();
    assert_eq!((late.stage, late.errno), (Stage::Control, Some(libc::ESRCH)));

    let streams = guest
        .create("two", spec(shell("sleep 60 & sleep 60 & wait")))
        .unwrap();
    guest.start("two").unwrap();
    guest.signal("two", None, libc::SIGKILL, true).unwrap();
    assert_eq!(guest.exited("two", None), ExitStatus::Signal(libc::SIGKILL));
    streams.finish();
}

fn terminal() {
    let mut guest = Guest::new();
    let script = "trap 'stty size' WINCH; stty size; tty; test -c /dev/console && echo console; echo ready; \
                  while :; do read line && break; done; echo \"got $line\"; exit 4";
    let size = WindowSize {
        rows: 31,
        columns: 97,
    };
    let mut stream = guest
        .create_with_terminal("one", spec(shell(script)), size)
        .unwrap();
    guest.start("one").unwrap();
    let first = read_until(&mut stream, "ready\r\n");
    assert_eq!(first, "31 97\r\n/dev/pts/0\r\nconsole\r\nready\r\n");
    let target = Target {
        container: "one".to_owned(),
        exec: None,
    };
    let size = WindowSize {
        rows: 10,
        columns: 20,
    };
    guest
        .call(Call::Resize {
            target: target.clone(),
            size,
        })
        .unwrap();
    stream.write_all(b"\nhello\n").unwrap();
    let rest = text(stream);
    assert!(rest.contains("10 20\r\n"), "{rest:?}");
    assert!(rest.contains("got"), "{rest:?}");
    assert_eq!(guest.exited("one", None), ExitStatus::Code(4));

    // Control-C reaches the foreground process.
    let mut stream = guest
        .create_with_terminal("two", spec(shell("echo ready; exec cat")), size)
        .unwrap();
    guest.start("two").unwrap();
    read_until(&mut stream, "ready\r\n");
    let (port, listener) = guest.port();
    drop((port, listener));
    stream.write_all(&[4]).unwrap(); // end of file, which `cat` ends at
    assert_eq!(guest.exited("two", None), ExitStatus::Code(0));
    drop(text(stream));

    // Without a terminal there is nothing to resize.
    guest.create("three", spec(shell("true"))).unwrap();
    let target = Target {
        container: "three".to_owned(),
        exec: None,
    };
    assert_eq!(
        guest.call(Call::Resize { target, size }).unwrap_err().errno,
        Some(libc::ENOTTY)
    );
}

fn credentials() {
    let mut guest = Guest::new();
    let mut config = shell(
        "id -u; id -g; id -G; umask; echo $HOME; pwd; ulimit -n; cat /proc/self/oom_score_adj; \
         grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status",
    );
    config["process"]["user"] = json!({"uid": 1000, "gid": 1001, "umask": 0o27, "additionalGids": [5, 6]});
    config["process"]["cwd"] = json!("/home/made/here");
    config["process"]["noNewPrivileges"] = json!(true);
    config["process"]["oomScoreAdj"] = json!(500);
    config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}]);
    let kill = json!(["CAP_KILL"]);
    config["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": kill, "permitted": kill, "inheritable": kill, "ambient": kill
    });
    let (out, err, _) = guest.run("one", spec(config));
    let want = "1000\n1001\n1001 5 6\n0027\n/home/user\n/home/made/here\n123\n500\n\
        CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
        CapBnd:\t0000000000000021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t0\n";
    assert_eq!((out.as_str(), err.as_str()), (want, ""));
    let mut config = shell("true");
    config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 4}]);
    assert_eq!(
        guest.create("two", spec(config)).err().unwrap().stage,
        Stage::Limits
    );
}

fn mounts() {
    let mut guest = Guest::new();
    std::fs::create_dir(guest.share("data")).unwrap();
    std::fs::write(guest.share("data/file"), "content").unwrap();
    std::fs::write(guest.share("single"), "one file").unwrap();
    std::fs::create_dir_all(guest.share("root/filled")).unwrap();
    std::fs::write(guest.share("root/filled/old"), "old").unwrap();
    let mut config = shell(
        "cat /data/file /made/by/us; touch /data/x; echo new >/data-rw/x; touch /filled/new && ls /filled; \
         touch /proc/sys/kernel/domainname; cat /proc/kcore | wc -c; ls /sys/firmware | wc -l; \
         touch /at-root; ls -ld /dev/shm | cut -c1-10; wc -l </proc/self/mounts >/dev/null && echo listed",
    );
    config["root"]["readonly"] = json!(true);
    let mounts = config["mounts"].as_array_mut().unwrap();
    let share = caisson_wire::agent::SHARE_DIR;
    mounts.push(json!({"destination": "/data", "type": "bind", "source": format!("{share}/data"), "options": ["rbind", "ro", "rprivate"]}));
    mounts.push(json!({"destination": "/data-rw", "type": "bind", "source": format!("{share}/data"), "options": ["bind", "noexec"]}));
    mounts.push(json!({"destination": "/made/by/us", "type": "bind", "source": format!("{share}/single"), "options": ["bind"]}));
    mounts.push(json!({"destination": "/filled", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]}));
    let (out, err, _) = guest.run("one", spec(config));
    assert_eq!(
        out, "contentone filenew\nold\n0\n0\ndrwxrwxrwt\nlisted\n",
        "{err}"
    );
    let refused: Vec<&str> = err
        .lines()
        .filter(|line| line.contains("Read-only file system"))
        .collect();
    assert_eq!(refused.len(), 3, "{err}");
    assert_eq!(std::fs::read_to_string(guest.share("data/x")).unwrap(), "new\n");

    for (mount, words) in [
        (
            json!({"destination": "/m", "type": "bind", "source": "/no/such", "options": ["bind"]}),
            "cannot bind /no/such to /m",
        ),
        (
            json!({"destination": "/m", "type": "nofs", "source": "x"}),
            "the kernel has no file system \"nofs\"",
        ),
        (
            json!({"destination": "/m", "type": "tmpfs", "source": "x", "options": ["bogus=1"]}),
            "cannot mount tmpfs at /m",
        ),
        (
            json!({"destination": "/m", "type": "bind", "source": "/tmp", "options": ["bind", "idmap"]}),
            "not supported",
        ),
    ] {
        let mut config = shell("true");
        config["mounts"].as_array_mut().unwrap().push(mount);
        let failed = guest.create("two", spec(config)).err().unwrap();
        assert_eq!(failed.stage, Stage::Mounts, "{failed}");
        assert!(failed.message.contains(words), "{failed}");
    }
}

fn escaping_mounts() {
    let mut guest = Guest::new();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), guest.share("root/out")).unwrap();
    std::os::unix::fs::symlink("../../../../../../..", guest.share("root/up")).unwrap();
    let mut config = shell("ls /out/made /up/made2 >/dev/null && echo inside");
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/up/made2", "type": "tmpfs", "source": "tmpfs"}));
    std::fs::create_dir_all(
        guest
            .share("root")
            .join(outside.path().strip_prefix("/").unwrap()),
    )
    .unwrap();
    let mut first = config.clone();
    first["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| mount["destination"] != "/tmp");
    first["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/out/made", "type": "tmpfs", "source": "tmpfs"}));
    assert_eq!(guest.run("one", spec(first)).0, "inside\n");
    assert!(!outside.path().join("made").exists());

    // What is trusted to be at /proc is not sent elsewhere.
    std::os::unix::fs::symlink("etc", guest.share("root/proc2")).unwrap();
    let mut config = shell("true");
    config["mounts"][0]["destination"] = json!("/proc2");
    assert_eq!(
        guest.create("two", spec(config)).err().unwrap().errno,
        Some(libc::ELOOP)
    );

    // A source below the share cannot lead out of it.
    std::os::unix::fs::symlink("/etc", guest.share("evil")).unwrap();
    let mut config = shell("true");
    let source = format!("{}/evil", caisson_wire::agent::SHARE_DIR);
    config["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/m", "type": "bind", "source": source, "options": ["bind"]}));
    assert_eq!(
        guest.create("two", spec(config)).err().unwrap().stage,
        Stage::Mounts
    );
}

fn devices() {
    let mut guest = Guest::new();
    let mut config = shell(
        "cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty fuse2; readlink ptmx; readlink fd; readlink stdout; \
         head -c3 /dev/zero | wc -c; mknod /dev/mem2 c 1 1 && head -c1 /dev/mem2",
    );
    config["linux"]["devices"] = json!([{"path": "/dev/fuse2", "type": "c", "major": 10, "minor": 229, "fileMode": 0o600, "uid": 0, "gid": 0}]);
    let (out, err, _) = guest.run("one", spec(config));
    let want = "null 1:3 666\nzero 1:5 666\nfull 1:7 666\nrandom 1:8 666\nurandom 1:9 666\ntty 5:0 666\n\
        fuse2 a:e5 600\npts/ptmx\n/proc/self/fd\n/proc/self/fd/1\n3\n";
    assert_eq!(out, want, "{err}");
    assert!(err.contains("mem2: Operation not permitted"), "{err}");
}

fn joins() {
    let mut guest = Guest::new();
    let streams = guest.create("pause", spec(shell("sleep 60"))).unwrap();
    guest.start("pause").unwrap();
    let config = shell("hostname other; hostname; cat /proc/1/cmdline | tr '\\0' ' '");
    let mut config = config;
    config["hostname"] = json!(null);
    config["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/9/ns/pid"}, {"type": "mount"},
        {"type": "network", "path": "/proc/9/ns/net"}, {"type": "uts", "path": "/proc/9/ns/uts"}]);
    config["process"]["capabilities"]["effective"] = json!(["CAP_SYS_ADMIN"]);
    config["process"]["capabilities"]["permitted"] = json!(["CAP_SYS_ADMIN"]);
    config["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_ADMIN"]);
    let join = [("pid", "pause"), ("uts", "pause"), ("network", "pause")];
    let second = guest.create_joined("app", spec(config.clone()), &join).unwrap();
    guest.start("app").unwrap();
    // The first process may not have come to its own execve yet.
    let seen = second.finish().0;
    assert!(
        seen.starts_with("other\n") && seen.ends_with("sleep 60 "),
        "{seen}"
    );
    assert_eq!(guest.exited("app", None), ExitStatus::Code(0));
    guest.delete("app").unwrap();

    let failed = guest
        .create_joined(
            "app",
            spec(config.clone()),
            &[("pid", "nobody"), ("uts", "pause")],
        )
        .err()
        .unwrap();
    assert_eq!(failed.stage, Stage::Namespaces);
    assert_eq!(
        guest.create("app", spec(config)).err().unwrap().stage,
        Stage::Namespaces
    );
    guest.signal("pause", None, libc::SIGKILL, true).unwrap();
    guest.exited("pause", None);
    drop(streams);
}

fn pauses() {
    let mut guest = Guest::new();
    let script = "echo ready; while read line; do echo $line; done";
    let mut streams = guest.create("one", spec(shell(script))).unwrap();
    guest.start("one").unwrap();
    read_until(&mut streams.stdout, "ready\n");
    guest
        .call(Call::Pause {
            container: "one".to_owned(),
        })
        .unwrap();
    streams.stdin.write_all(b"text\n").unwrap();
    streams
        .stdout
        .set_read_timeout(Some(std::time::Duration::from_millis(100)))
        .unwrap();
    let silence = streams.stdout.read(&mut [0; 1]).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    guest
        .call(Call::Resume {
            container: "one".to_owned(),
        })
        .unwrap();
    streams
        .stdout
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    read_until(&mut streams.stdout, "text\n");

    // A paused container can be killed and deleted.
    guest
        .call(Call::Pause {
            container: "one".to_owned(),
        })
        .unwrap();
    guest.signal("one", None, libc::SIGKILL, true).unwrap();
    assert_eq!(guest.exited("one", None), ExitStatus::Signal(libc::SIGKILL));
    guest.delete("one").unwrap();
}

fn filters() {
    let mut guest = Guest::new();
    for (number, no_new_privs) in [(0, true), (1, false)] {
        let id = format!("c{number}");
        let mut config =
            shell("mkdir /tmp/x; grep ^Seccomp: /proc/self/status; grep CapPrm /proc/self/status");
        config["process"]["noNewPrivileges"] = json!(no_new_privs);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
        });
        config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (out, err, _) = guest.run(&id, spec(config));
        // CAP_SYS_ADMIN, which loading the filter took, is gone.
        assert_eq!(out, "Seccomp:\t2\nCapPrm:\t0000000000000000\n", "{err}");
        assert!(err.contains("not supported"), "{err}");
    }
    let mut config = shell("true");
    config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
    assert_eq!(
        guest.create("two", spec(config)).err().unwrap().stage,
        Stage::Seccomp
    );
}

fn hooks() {
    let mut guest = Guest::new();
    let busybox = format!("{}/root/bin/busybox", caisson_wire::agent::SHARE_DIR);
    let mut config = shell("cat /hooked");
    let write = |word: &str| {
        format!(
            "cat >/dev/null; echo {word} >>{}/root/hooked",
            caisson_wire::agent::SHARE_DIR
        )
    };
    config["hooks"] = json!({
        "createContainer": [{"path": busybox, "args": ["sh", "-c", write("create")], "env": ["PATH=/bin", "A=b"]}],
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "grep -o '\"status\":\"[a-z]*\"' >>/hooked"], "env": ["PATH=/bin"]}],
    });
    let (out, err, _) = guest.run("one", spec(config));
    assert_eq!(out, "create\n\"status\":\"created\"\n", "{err}");

    let mut config = shell("true");
    config["hooks"] = json!({"createContainer": [{"path": busybox, "args": ["false"]}]});
    assert_eq!(
        guest.create("two", spec(config)).err().unwrap().stage,
        Stage::Hooks
    );
    let mut config = shell("true");
    config["hooks"] = json!({"createContainer": [{"path": busybox, "args": ["sleep", "60"], "timeout": 1}]});
    let failed = guest.create("two", spec(config)).err().unwrap();
    assert!(failed.message.contains("took longer than 1 s"), "{failed}");
}

fn concurrency() {
    let mut guest = Guest::new();
    let busybox = format!("{}/root/bin/busybox", caisson_wire::agent::SHARE_DIR);
    let mut slow = shell("true");
    slow["hooks"] = json!({"createContainer": [{"path": busybox, "args": ["sleep", "3"]}]});
    let create = Call::Create(Box::new(caisson_wire::agent::Create {
        container: "slow".to_owned(),
        root: caisson_wire::agent::Root::Share {
            path: "root".to_owned(),
        },
        spec: spec(slow),
        stdio: Default::default(),
        join: Default::default(),
    }));
    let first = guest.send(create);
    let start = guest.send(Call::Start {
        container: "slow".to_owned(),
    });
    let (out, _, _) = guest.run("quick", spec(shell("echo done")));
    assert_eq!(out, "done\n");
    assert!(
        guest.unclaimed().is_empty(),
        "the slow one came first: {:?}",
        guest.unclaimed()
    );
    assert!(matches!(guest.answer(first), Ok(Reply::Process { .. })));
    guest.answer(start).unwrap();
    assert_eq!(guest.exited("slow", None), ExitStatus::Code(0));
}

fn user_namespace() {
    let mut guest = Guest::new();
    // The mapped root must be able to reach the image and to make mount points in it.
    std::process::Command::new("chown")
        .args(["-R", "100000:100000"])
        .arg(guest.share("root"))
        .status()
        .unwrap();
    std::process::Command::new("chmod")
        .arg("755")
        .arg(guest.share(""))
        .arg(guest.share(".."))
        .status()
        .unwrap();
    let mut config = shell("id -u; cat /proc/self/uid_map | tr -s ' '; head -c1 /dev/zero | wc -c");
    config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    let streams = guest.create("one", spec(config)).unwrap();
    guest.start("one").unwrap();
    let (out, err) = streams.finish();
    assert_eq!(out, "0\n 0 100000 65536\n1\n", "{err}");
}

fn measures() {
    let mut guest = Guest::new();
    let mut streams = guest
        .create("one", spec(shell("sleep 61 & echo ready; wait")))
        .unwrap();
    guest.start("one").unwrap();
    read_until(&mut streams.stdout, "ready\n");
    // The second process is the shell's until it has become `sleep`.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let rows = loop {
        let request = Call::Processes {
            container: "one".to_owned(),
        };
        let Reply::Processes(rows) = guest.call(request).unwrap() else {
            panic!("another answer")
        };
        let settled = rows.iter().any(|row| row.command == "sleep 61");
        if settled || std::time::Instant::now() > deadline {
            break rows;
        }
    };
    let mut commands: Vec<(i32, &str)> = rows
        .iter()
        .map(|row| (row.inner_pid, row.command.as_str()))
        .collect();
    commands.sort_unstable();
    assert_eq!(commands[0], (1, "sh -c sleep 61 & echo ready; wait"));
    assert_eq!(commands[1].1, "sleep 61");
    let Reply::Stats(stats) = guest
        .call(Call::Stats {
            container: "one".to_owned(),
        })
        .unwrap()
    else {
        panic!("another answer");
    };
    assert!(stats.cpu_usage_us > 0, "{stats:?}");
}

fn out_of_turn() {
    let mut guest = Guest::new();
    let start = |id: &str| Call::Start {
        container: id.to_owned(),
    };
    assert_eq!(guest.call(start("nobody")).unwrap_err().errno, Some(libc::ENOENT));
    let streams = guest.create("one", spec(shell("sleep 60"))).unwrap();
    assert_eq!(
        guest.create("one", spec(shell("true"))).err().unwrap().errno,
        Some(libc::EEXIST)
    );
    guest.start("one").unwrap();
    assert_eq!(guest.start("one").unwrap_err().stage, Stage::Request);
    assert_eq!(guest.delete("one").unwrap_err().errno, Some(libc::EBUSY));
    guest.signal("one", None, libc::SIGKILL, false).unwrap();
    guest.exited("one", None);
    guest.delete("one").unwrap();
    drop(streams);
}

fn never_started() {
    let mut guest = Guest::new();
    let streams = guest.create("one", spec(shell("echo never"))).unwrap();
    guest.signal("one", None, libc::SIGKILL, false).unwrap();
    assert_eq!(guest.exited("one", None), ExitStatus::Signal(libc::SIGKILL));
    assert_eq!(guest.start("one").unwrap_err().errno, Some(libc::ESRCH));
    assert_eq!(streams.finish().0, "");
    guest.delete("one").unwrap();
    // And without the signal too.
    guest.create("two", spec(shell("echo never"))).unwrap();
    guest.delete("two").unwrap();
    assert!(guest.cgroups().is_empty());
}

fn reopened_output() {
    let mut guest = Guest::new();
    let mut config =
        shell("echo again >/dev/stdout; echo error >/dev/stderr; test -p /dev/stdout && echo pipe");
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    config["process"]["capabilities"] = json!({});
    let (out, err, _) = guest.run("one", spec(config));
    assert_eq!((out.as_str(), err.as_str()), ("again\npipe\n", "error\n"));
}

/// Reads until the text ends in `end`.
fn read_until(stream: &mut impl Read, end: &str) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0; 1];
    while !bytes.ends_with(end.as_bytes()) {
        let count = stream
            .read(&mut byte)
            .expect("the program says something in time");
        assert!(
            count == 1,
            "the stream ended after {:?}",
            String::from_utf8_lossy(&bytes)
        );
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}
