//! What the process finds inside: identity, limits, namespaces, time.

use serde_json::json;

use crate::world::World;

#[test]
fn identity_limits_and_paths_are_as_configured() {
    let world = World::new();
    let outcome = world.run_script(
        "id -u; id -g; id -G; pwd; ulimit -n; hostname; grep -E 'NoNewPrivs|CapEff|Seccomp:' /proc/self/status | \
         tr -d '\\t'; cat /proc/self/oom_score_adj; cat /proc/sys/net/ipv4/ip_forward; \
         cat /proc/kcore | wc -c; (echo 1 > /proc/sys/vm/drop_caches) 2>/dev/null || echo read-only; umask",
        |config| {
            config["process"]["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [7, 8], "umask": 0o27 });
            config["process"]["cwd"] = "/tmp".into();
            config["process"]["oomScoreAdj"] = 500.into();
            config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
            config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{ "names": ["syslog"], "action": "SCMP_ACT_ERRNO" }]
            });
        },
    );
    let want = "1000\n1000\n1000 7 8\n/tmp\n1024\ncaisson\nCapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n500\n1\n0\nread-only\n0027\n";
    assert_eq!(outcome.stdout, want, "{outcome:?}");
}

#[test]
fn a_read_only_root_takes_no_write() {
    let world = World::new();
    let outcome = world.run_script("touch /x 2>&1; touch /dev/shm/y && echo shm", |config| {
        config["root"]["readonly"] = true.into();
    });
    assert!(outcome.stdout.contains("Read-only file system"), "{outcome:?}");
    assert!(outcome.stdout.ends_with("shm\n"), "{outcome:?}");
}

#[test]
fn memory_past_the_limit_is_137() {
    let world = World::new();
    let outcome = world.run_script("exec tail -n 1 /dev/zero", |config| {
        config["linux"]["resources"]["memory"] = json!({ "limit": 32 << 20 });
    });
    assert_eq!(outcome.status.code(), Some(137), "{outcome:?}");
    assert!(
        outcome.stderr.contains("memory"),
        "the reason is not said: {outcome:?}"
    );
}

#[test]
fn a_fork_bomb_is_held_by_the_pids_limit() {
    let world = World::new();
    let outcome = world.run_script(
        "i=0; while [ $i -lt 100 ]; do sleep 30 & i=$((i+1)); done 2>/dev/null; echo never",
        |config| config["linux"]["resources"]["pids"] = json!({ "limit": 20 }),
    );
    assert_ne!(outcome.stdout, "never\n", "{outcome:?}");
    assert_ne!(outcome.status.code(), Some(0), "{outcome:?}");
    world.assert_nothing_left();
}

#[test]
fn clocks_agree_with_the_host() {
    let world = World::new();
    let outcome = world.run_script("date +%s", |_| {});
    let guest: u64 = outcome
        .stdout
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("{outcome:?}"));
    let host = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(
        host.abs_diff(guest) <= 5,
        "the guest says {guest}, the host {host}"
    );
}

#[test]
fn two_processors_are_two() {
    let world = World::new();
    let outcome = world.run_script("nproc", |config| {
        config["annotations"] = json!({ "io.caisson.vcpus": "2" });
    });
    assert_eq!(outcome.stdout, "2\n", "{outcome:?}");
}
