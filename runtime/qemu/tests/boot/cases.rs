//! What the supervisor sees of the QEMU machine.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_wire::agent::{Call, Create, FromAgent, Root, Setup, Stdio};
use caisson_wire::vmm::{Answer, Confine, End, FromVmm, Order, ToVmm};

use crate::supervisor::{Agent, Guest, Plan, Vmm};

#[derive(Clone, Copy)]
pub(crate) enum Case {
    Plain(fn()),
    Guest(fn(&Guest)),
}

pub(crate) const ALL: [(&str, Case); 9] = [
    ("the_agent_dials_and_the_guest_powers_off", Case::Guest(life)),
    ("a_container_uses_files_of_the_share", Case::Guest(container)),
    ("it_runs_unconfined_too", Case::Guest(unconfined)),
    ("a_paused_guest_goes_on", Case::Guest(paused)),
    ("a_kernel_panic_is_told_with_the_console", Case::Guest(panics)),
    ("a_killed_qemu_is_told", Case::Guest(killed)),
    ("qemu_has_no_capability_and_sees_no_home", Case::Guest(confined)),
    ("a_missing_emulator_names_its_package", Case::Plain(no_emulator)),
    ("what_is_no_kernel_is_refused", Case::Plain(no_kernel)),
];

fn set_up(agent: &mut Agent, share: bool) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let answer = agent.call(Call::Setup(Box::new(Setup {
        version: caisson_wire::VERSION,
        hostname: "test".to_owned(),
        time_ns: u64::try_from(now.as_nanos()).unwrap(),
        entropy: vec![7; 32],
        share,
        interfaces: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
        sysctl: std::collections::BTreeMap::new(),
    })));
    assert!(
        matches!(&answer, FromAgent::Answer { outcome: Ok(_), .. }),
        "{answer:?}"
    );
}

/// Powers the guest off; it may be gone before its answer has come.
fn power_off(vmm: Vmm, mut agent: Agent) {
    let answer = agent.call(Call::Shutdown);
    assert!(
        matches!(&answer, FromAgent::Answer { outcome: Ok(_), .. }),
        "{answer:?}"
    );
    let log = vmm.log();
    let (how, console) = vmm.ended();
    assert_eq!(how, End::PowerOff, "{console}; {log}");
}

fn life(guest: &Guest) {
    let share = tempfile::tempdir().unwrap();
    let mut vmm = Plan {
        share: Some(share.path()),
        ..Plan::of(guest)
    }
    .launch();
    vmm.started();
    let mut agent = vmm.agent();
    set_up(&mut agent, true);
    power_off(vmm, agent);
}

/// Operations on files, each of which must be allowed to the confined file server.
const SCRIPT: &str = "set -e; umask 0; cat given; echo made > f; ln -s f link; ln f hard; mkdir -p d/e; mv f d/e/f; \
    chmod 4751 d/e/f; chown 1234:4000000000 d/e/f; touch -d '2001-02-03 04:05:06' hard; mkfifo pipe; \
    truncate -s 5368709120 big; dd if=/dev/zero of=big bs=4096 seek=1000000 count=3 conv=notrunc,fsync 2>/dev/null; \
    stat -f . >/dev/null; ls -la . d >/dev/null; cp -a d d2; rm -r d2; readlink link; sync; \
    i=0; while [ $i -lt 200 ]; do echo $i > n$i; i=$((i+1)); done; ls | wc -l; rm n*; \
    cat given > copy; mv copy hard2; df . >/dev/null; echo done";

fn container(guest: &Guest) {
    let share = tempfile::tempdir().unwrap();
    let root = share.path().join("c/rootfs");
    for name in ["bin", "dev", "proc", "sys", "work"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    fs::write(root.join("work/given"), "given by the host\n").unwrap();
    let mut vmm = Plan {
        share: Some(share.path()),
        ..Plan::of(guest)
    }
    .launch();
    vmm.started();
    let mut agent = vmm.agent();
    set_up(&mut agent, true);
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/busybox", "sh", "-c", format!("exec 2>&1; \
                /bin/busybox --install -s /bin; export PATH=/bin; {SCRIPT}")],
            "env": ["PATH=/bin"],
            "cwd": "/work",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE", "CAP_FSETID"],
                "effective": ["CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE", "CAP_FSETID"],
                "permitted": ["CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE", "CAP_FSETID"],
            },
        },
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    });
    let answer = agent.call(Call::Create(Box::new(Create {
        container: "c".to_owned(),
        root: Root::Share {
            path: "c/rootfs".to_owned(),
        },
        spec: serde_json::from_value(spec).unwrap(),
        stdio: Stdio {
            stdout: Some(5000),
            ..Stdio::default()
        },
        join: std::collections::BTreeMap::new(),
    })));
    assert!(
        matches!(&answer, FromAgent::Answer { outcome: Ok(_), .. }),
        "{answer:?}; {}",
        vmm.log()
    );
    let (message, mut streams) = vmm.next();
    assert_eq!(message, FromVmm::GuestConnected { port: 5000 });
    let started = agent.call(Call::Start {
        container: "c".to_owned(),
    });
    assert!(
        matches!(&started, FromAgent::Answer { outcome: Ok(_), .. }),
        "{started:?}"
    );
    let mut printed = String::new();
    std::io::Read::read_to_string(&mut fs::File::from(streams.remove(0)), &mut printed).unwrap();
    assert!(
        printed.starts_with("given by the host\nf\n") && printed.ends_with("done\n"),
        "{printed}; {}",
        vmm.log()
    );
    let made = fs::metadata(root.join("work/d/e/f")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.nlink()), (1234, 4_000_000_000, 2));
    let big = fs::metadata(root.join("work/big")).unwrap();
    assert!(big.len() == 5 << 30 && big.blocks() < 100, "{big:?}");
    assert_eq!(fs::read_to_string(root.join("work/hard")).unwrap(), "made\n");
    vmm.sender.send(&ToVmm::Shutdown).unwrap();
    assert_eq!(vmm.ended().0, End::Stopped);
}

fn unconfined(guest: &Guest) {
    let mut vmm = Plan {
        confine: Confine::Off,
        ..Plan::of(guest)
    }
    .launch();
    vmm.started();
    let agent = vmm.agent();
    power_off(vmm, agent);
}

fn paused(guest: &Guest) {
    let mut vmm = Plan::of(guest).launch();
    vmm.started();
    let mut agent = vmm.agent();
    let mut ask = |id, order| {
        vmm.sender.send(&ToVmm::Ask { id, order }).unwrap();
        match vmm.next().0 {
            FromVmm::Answer { outcome, .. } => outcome.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let usage = |answer| match answer {
        Answer::Usage(usage) => usage,
        Answer::Done => panic!("no usage"),
    };
    assert_eq!(ask(1, Order::Pause), Answer::Done);
    let before = usage(ask(2, Order::Usage));
    assert!(
        before.guest_resident > 16 << 20 && before.guest_resident <= 256 << 20,
        "{before:?}"
    );
    assert!(before.vcpu_us > 100_000, "{before:?}");
    std::thread::sleep(Duration::from_millis(300));
    let after = usage(ask(3, Order::Usage));
    assert!(after.vcpu_us - before.vcpu_us < 100_000, "{before:?} {after:?}");
    assert_eq!(ask(4, Order::Resume), Answer::Done);
    set_up(&mut agent, false);
    vmm.sender.send(&ToVmm::Shutdown).unwrap();
    assert_eq!(vmm.ended().0, End::Stopped);
}

fn panics(guest: &Guest) {
    let mut vmm = Plan {
        cmdline: "rdinit=/missing root=/dev/none",
        ..Plan::of(guest)
    }
    .launch();
    vmm.started();
    let (how, console) = vmm.ended();
    assert!(
        matches!(&how, End::Reset) || how == End::Crashed("the guest's kernel panicked".to_owned()),
        "{how:?}"
    );
    assert!(console.contains("Kernel panic"), "{console}");
}

fn killed(guest: &Guest) {
    let mut vmm = Plan::of(guest).launch();
    vmm.started();
    let qemu = rustix::process::Pid::from_raw(vmm.descendant("qemu-system-x86_64")).unwrap();
    rustix::process::kill_process(qemu, rustix::process::Signal::KILL).unwrap();
    let (how, _) = vmm.ended();
    assert_eq!(how, End::Crashed("QEMU was killed by signal 9".to_owned()));
}

fn confined(guest: &Guest) {
    let mut vmm = Plan::of(guest).launch();
    vmm.started();
    let qemu = vmm.descendant("qemu-system-x86_64");
    let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    for line in [
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
    let root = |name: &str| Path::new(&format!("/proc/{qemu}/root")).join(name);
    for name in ["root", "home", "etc/passwd", "var", "tmp", "dev", "sys"] {
        assert!(!root(name).exists(), "{name}");
    }
    assert!(root("usr/bin").exists());
    vmm.sender.send(&ToVmm::Shutdown).unwrap();
    assert_eq!(vmm.ended().0, End::Stopped);
    // It died with its PID namespace.
    let gone = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        !Path::new(&format!("/proc/{qemu}")).exists()
    });
    assert!(gone);
}

fn refused(plan: &Plan<'_>) -> (String, String) {
    match plan.launch().ended().0 {
        End::Refused { stage, cause } => (stage, cause),
        other => panic!("{other:?}"),
    }
}

fn no_emulator() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (stage, cause) = refused(&Plan {
        kernel: file.path(),
        initramfs: file.path(),
        cmdline: "",
        program: "/nowhere/qemu-system-x86_64",
        share: None,
        confine: Confine::Full,
    });
    assert_eq!(stage, "find the emulator");
    assert!(cause.contains("apt-get install qemu-system-x86"), "{cause}");
}

fn no_kernel() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "no kernel").unwrap();
    let (stage, cause) = refused(&Plan {
        kernel: file.path(),
        initramfs: file.path(),
        cmdline: "",
        program: "/bin/true",
        share: None,
        confine: Confine::Full,
    });
    assert_eq!(stage, "recognize the kernel");
    assert!(cause.contains("neither a bzImage"), "{cause}");
}
