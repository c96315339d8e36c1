//! Standard streams, terminals and signals.

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use rustix::process::Signal;

use crate::world::{LIMIT, World, finish, kill, wait};

#[test]
fn input_reaches_the_process_and_so_does_its_end() {
    let world = World::new();
    let bundle = world.bundle("b", "cat; echo end", |_| {});
    let mut child = world
        .caisson(&["run", "--bundle", &bundle, "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let mut stdout = child.stdout.take().unwrap();
    assert_eq!(wait(child, LIMIT).and_then(|status| status.code()), Some(0));
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello\nend\n");
    world.assert_nothing_left();
}

#[test]
fn much_output_arrives_whole() {
    let world = World::new();
    let outcome = world.run_script("seq 1 500000 | tee /tmp/all; md5sum < /tmp/all >&2", |_| {});
    let expected: String = (1..=500_000).map(|number| format!("{number}\n")).collect();
    assert_eq!(outcome.stdout.len(), expected.len());
    assert!(outcome.stdout == expected, "the output was changed on its way");
}

#[test]
fn a_signal_to_the_command_reaches_the_process() {
    let world = World::new();
    let bundle = world.bundle(
        "b",
        "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 1 & wait $!; done",
        |_| {},
    );
    let mut child = world
        .caisson(&["run", "--bundle", &bundle, "c"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).unwrap();
    kill(i32::try_from(child.id()).unwrap(), Signal::TERM);
    assert_eq!(wait(child, LIMIT).and_then(|status| status.code()), Some(9));
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "got\n");
    world.assert_nothing_left();
}

#[test]
fn a_terminal_is_one_and_has_the_callers_size() {
    let world = World::new();
    let bundle = world.bundle("b", "tty; stty size; read line; echo \"got $line\"", |config| {
        config["process"]["terminal"] = true.into();
    });
    let controller =
        rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    rustix::pty::grantpt(&controller).unwrap();
    rustix::pty::unlockpt(&controller).unwrap();
    let name = rustix::pty::ptsname(&controller, Vec::new()).unwrap();
    let side = || {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap()
    };
    let size = rustix::termios::Winsize {
        ws_row: 31,
        ws_col: 77,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&controller, size).unwrap();
    let child = world
        .caisson(&["run", "--bundle", &bundle, "c"])
        .stdin(side())
        .stdout(side())
        .stderr(side())
        .spawn()
        .unwrap();
    let mut controller = std::fs::File::from(controller);
    controller.write_all(b"hello\r").unwrap();
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut bytes = [0; 1024];
        // The last side that closes ends the reading with EIO.
        while let Ok(got) = controller.read(&mut bytes)
            && got > 0
        {
            seen.extend_from_slice(&bytes[..got]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    });
    let status = wait(child, LIMIT);
    let seen = reader.join().unwrap();
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{seen}");
    assert!(
        seen.contains("/dev/pts/0") || seen.contains("/dev/console"),
        "{seen}"
    );
    assert!(seen.contains("31 77") && seen.contains("got hello"), "{seen}");
}

#[test]
fn a_detached_process_is_left_alone_and_its_pid_is_told() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    let pid_file = world.directory.path().join("exec-pid");
    let outcome = finish(&mut world.caisson(&[
        "exec",
        "--detach",
        "--pid-file",
        pid_file.to_str().unwrap(),
        "c",
        "sh",
        "-c",
        "sleep 1000",
    ]));
    assert!(outcome.status.success(), "{outcome:?}");
    let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    assert!(std::fs::exists(format!("/proc/{pid}")).unwrap());
    world.ok(&["delete", "--force", "c"]);
    crate::world::eventually("its stand-in has gone", || {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    world.assert_nothing_left();
}
