//! What the supervisor sees.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};

use caisson_wire::vmm::{Answer, Confine, End, Fd, FromVmm, Order, ToVmm};
use rustix::mount::mount_bind;

use crate::supervisor::{Vmm, fds, launch, share};

pub(crate) const ALL: [(&str, fn()); 15] = [
    (
        "confined_it_has_an_empty_root_and_the_listed_capabilities",
        nothing_left,
    ),
    ("the_share_works_and_sees_later_mounts", later_mounts),
    (
        "a_vcpu_that_opens_a_file_ends_the_process_with_a_line",
        vcpu_opens,
    ),
    ("an_exec_kills_the_process", executes),
    ("executable_memory_cannot_be_made", code),
    ("the_main_thread_cannot_open_files", control_opens),
    ("a_worker_may_do_more_than_the_vcpu_that_asked_for_it", nested),
    ("connections_arrive_with_their_descriptor_after_the_start", dial),
    ("connections_beyond_the_queue_are_refused", flood),
    ("orders_are_answered_and_shutdown_stops", orders),
    ("another_version_is_refused", version),
    ("a_failed_build_is_refused_with_its_chain", no_build),
    ("the_end_is_reported_once", twice),
    ("it_ends_with_its_supervisor", deserted),
    ("a_panic_ends_the_process", panics),
];

fn nothing_left() {
    let mut vmm = Vmm::launched(&launch("probe"), &[]);
    vmm.started();
    let log = vmm.log();
    let (how, console) = vmm.ended();
    assert_eq!(how, End::PowerOff, "{log}");
    assert!(!log.contains("no user namespace"), "{log}");
    let kept = "CapabilitySet(CHOWN | DAC_OVERRIDE | FOWNER | FSETID | SETGID | SETUID | SETFCAP)";
    for line in [
        "building",
        "passwd: true",
        "create: true",
        &format!("effective: {kept}"),
        &format!("permitted: {kept}"),
        "inheritable: CapabilitySet(0x0)",
    ] {
        assert!(console.contains(line), "{line} in {console}; {log}");
    }
    assert!(
        console.contains("root: 2\n") || console.contains("root: Permission denied"),
        "{console}"
    );
}

fn later_mounts() {
    let (at, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let descriptors = [share(at.path())];
    fs::write(at.path().join("file"), "early").unwrap();
    fs::write(source.path().join("file"), "bound").unwrap();
    let private = source.path().join("private");
    fs::write(&private, "secret").unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o600)).unwrap();
    chown(&private, Some(77), Some(77)).unwrap();
    let mut launch = launch("share");
    launch.share = Some(Fd(0));
    let mut vmm = Vmm::launched(&launch, &fds(&descriptors));
    fs::create_dir(at.path().join("late")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300)); // it is confined by now
    mount_bind(source.path(), at.path().join("late")).unwrap();
    vmm.started();
    let log = vmm.log();
    let (how, console) = vmm.ended();
    assert_eq!(how, End::PowerOff);
    for line in [
        r#"file: Ok("early")"#,
        r#"late: Ok("bound")"#,
        "new: Ok(())",
        r#"private: Ok("secret")"#,
        "rename: Ok(())",
        "node: true",
        "escape: true",
    ] {
        assert!(console.contains(line), "{line} in {console}; {log}");
    }
    let made = fs::metadata(source.path().join("dir/new")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1234, 4_000_000_000));
    rustix::mount::unmount(at.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// 128 + SIGSYS.
const TRAPPED: i32 = 159;

fn trapped(behaviour: &str, says: &str) {
    let (status, log) = Vmm::launched(&launch(behaviour), &[]).breaks();
    assert_eq!(status.code(), Some(TRAPPED), "{log}");
    assert!(log.contains(says), "{log}");
}

fn vcpu_opens() {
    trapped("vcpu opens", "thread probe made system call ");
}

fn control_opens() {
    trapped("control opens", "which its filter does not allow");
}

fn code() {
    trapped("files makes code", "thread probe made system call 9,");
}

fn executes() {
    // The fork that comes first is outside the list, and is reported; an exec alone would kill.
    let (status, log) = Vmm::launched(&launch("vcpu executes"), &[]).breaks();
    assert!(!status.success(), "{log}");
}

fn nested() {
    let mut vmm = Vmm::launched(&launch("nested"), &[]);
    vmm.started();
    assert_eq!(vmm.ended().0, End::Reset);
}

fn dial() {
    let mut vmm = Vmm::launched(&launch("dial"), &[]);
    vmm.started();
    let (message, mut descriptors) = vmm.next();
    assert_eq!(message, FromVmm::GuestConnected { port: 1024 });
    let mut stream = std::os::unix::net::UnixStream::from(descriptors.remove(0));
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    vmm.sender.send(&ToVmm::Shutdown).unwrap();
    assert_eq!(vmm.ended().0, End::Stopped);
}

fn flood() {
    let mut vmm = Vmm::launched(&launch("flood"), &[]);
    vmm.started();
    for _ in 0..128 {
        let (message, descriptors) = vmm.next();
        assert_eq!(message, FromVmm::GuestConnected { port: 1 });
        assert_eq!(descriptors.len(), 1);
    }
    vmm.sender.send(&ToVmm::Shutdown).unwrap();
    assert!(vmm.ended().1.contains("refused: true"));
}

fn orders() {
    for confine in [Confine::Full, Confine::Off] {
        let mut launch = launch("idle");
        launch.confine = confine;
        let mut vmm = Vmm::launched(&launch, &[]);
        vmm.started();
        let mut ask = |id, order| {
            vmm.sender.send(&ToVmm::Ask { id, order }).unwrap();
            match vmm.next().0 {
                FromVmm::Answer { id: of, outcome } if of == id => outcome,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ask(7, Order::Resume), Ok(Answer::Done));
        let refused = ask(8, Order::Pause).unwrap_err();
        assert_eq!(refused, "cannot pause vCPU 0: it does not come out");
        assert!(matches!(ask(9, Order::Usage), Ok(Answer::Usage(usage)) if usage.vcpu_us == 2));
        vmm.sender.send(&ToVmm::Shutdown).unwrap();
        vmm.sender.send(&ToVmm::Shutdown).unwrap();
        assert_eq!(vmm.ended().0, End::Stopped);
    }
}

fn version() {
    let mut launch = launch("idle");
    launch.version += 1;
    let (how, _) = Vmm::launched(&launch, &[]).ended();
    assert!(
        matches!(&how, End::Refused { stage, cause } if stage == "read the launch message" && cause.contains("version 2")),
        "{how:?}"
    );
    let vmm = Vmm::start();
    vmm.sender.send(&"no message of ours").unwrap();
    assert!(matches!(vmm.ended().0, End::Refused { .. }));
}

fn no_build() {
    let (how, _) = Vmm::launched(&launch("no build"), &[]).ended();
    let End::Refused { stage, cause } = how else {
        panic!("{how:?}")
    };
    assert_eq!(stage, "open /dev/kvm");
    assert_eq!(cause, "the device is forbidden: permission denied");
}

fn twice() {
    let mut vmm = Vmm::launched(&launch("twice"), &[]);
    vmm.started();
    assert_eq!(vmm.ended().0, End::Crashed("vCPU 0 is lost".to_owned()));
}

fn deserted() {
    let mut vmm = Vmm::launched(&launch("idle"), &[]);
    vmm.started();
    let began = std::time::Instant::now();
    assert_eq!(vmm.desert().code(), Some(1));
    assert!(began.elapsed() < std::time::Duration::from_secs(2));
    // Before the launch, too.
    assert_eq!(Vmm::start().desert().code(), Some(1));
}

fn panics() {
    let (status, log) = Vmm::launched(&launch("panic"), &[]).breaks();
    assert_eq!(status.code(), Some(101), "{log}");
    assert!(log.contains("a broken invariant"), "{log}");
}
