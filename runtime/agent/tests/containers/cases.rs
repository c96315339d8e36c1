//! What containers are promised.

use std::io::{Read, Write};

use caisson_wire::agent::{Call, ExitStatus, Reply, Stage, Target, WindowSize};
use serde_json::json;

use crate::guest::{Guest, process, shell, spec, text};

/// Every case by its name.
pub const ALL: &[(&str, fn())] = &[
    ("a_container_runs_and_its_code_is_reported", runs),
    ("input_reaches_the_program_and_ends", input),
    ("a_program_that_is_not_there_fails_at_create", missing_program),
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
