//! The binary as engines and people call it: what is wrong is said in one line, with stage, cause and what to do,
//! and the exit codes and formats are those of runc 1.1.5.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A bundle, a root directory, and an ELF file that may pass for a kernel.
struct World {
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(at("bundle/rootfs")).unwrap();
        let mut kernel = vec![0_u8; 0x300];
        kernel[..4].copy_from_slice(b"\x7fELF");
        kernel[18] = match std::env::consts::ARCH {
            "aarch64" => 183,
            _ => 62,
        };
        std::fs::write(at("kernel"), kernel).unwrap();
        std::fs::write(at("initramfs"), "initramfs").unwrap();
        let world = Self { directory };
        world.config(&config());
        world
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn config(&self, config: &Value) {
        std::fs::write(self.path().join("bundle/config.json"), config.to_string()).unwrap();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_caisson"));
        command
            .arg("--root")
            .arg(self.path().join("root"))
            .args(words)
            .current_dir(self.path().join("bundle"))
            .stdin(Stdio::null())
            .env_clear()
            .env("CAISSON_KERNEL", self.path().join("kernel"))
            .env("CAISSON_INITRAMFS", self.path().join("initramfs"));
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs what must fail; gives the exit code and what was said, which is one line.
    fn fail(&self, words: &[&str]) -> (i32, String) {
        let output = self.run(words);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("caisson: "), "{words:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{words:?}: {text}");
        assert!(!self.path().join("root/a").exists(), "{words:?} left something");
        (output.status.code().unwrap(), text)
    }
}

fn config() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
    })
}

#[test]
fn a_bundle_that_cannot_be_run_says_why() {
    let with = |pointer: &str, value: Value| {
        let mut config = config();
        *config.pointer_mut(pointer).unwrap() = value;
        config
    };
    for (config, parts) in [
        (
            with("/ociVersion", json!("2.0.0")),
            &["ociVersion \"2.0.0\"", "1.x.y"][..],
        ),
        (with("/root/path", json!("nowhere")), &["nowhere", "No such file"]),
        (
            with("/process/args", json!([])),
            &["process.args", "name the program"],
        ),
        (with("/process", json!(null)), &["no process", "add"]),
        (with("/process/cwd", json!("x")), &["process.cwd"]),
        (
            json!({"ociVersion": 1}),
            &["cannot understand", "config.json", "line 1"],
        ),
    ] {
        let world = World::new();
        world.config(&config);
        for verb in ["create", "run"] {
            let (code, text) = world.fail(&[verb, "a"]);
            assert_eq!(code, 1, "{text}");
            for part in parts {
                assert!(text.contains(part), "{part}: {text}");
            }
        }
    }
}

#[test]
fn a_bundle_that_is_not_there_says_where_it_was_looked_for() {
    let world = World::new();
    let (code, text) = world.fail(&["run", "--bundle", "/nonexistent/bundle", "a"]);
    assert!(
        code == 1 && text.contains("/nonexistent/bundle") && text.contains("--bundle"),
        "{text}"
    );
    std::fs::remove_file(world.path().join("bundle/config.json")).unwrap();
    let (code, text) = world.fail(&["run", "a"]);
    assert!(
        code == 1 && text.contains("\"caisson spec\" writes one"),
        "{text}"
    );
    std::fs::write(world.path().join("bundle/config.json"), "{").unwrap();
    let (code, text) = world.fail(&["run", "a"]);
    assert!(code == 1 && text.contains("cannot understand"), "{text}");
}

#[test]
fn ids_that_could_be_paths_are_refused() {
    let world = World::new();
    for id in ["../x", "a/b", "..", "", &"x".repeat(4096)] {
        for verb in ["create", "run", "state", "delete", "start"] {
            let (code, _) = world.fail(&[verb, id]);
            assert_eq!(code, 1, "{verb} {id}");
        }
    }
}

#[test]
fn what_a_guest_is_made_of_is_missed_before_anything_is_made() {
    let world = World::new();
    let qemu = world.path().join("qemu");
    std::fs::write(&qemu, "#!/bin/false\n").unwrap();
    std::fs::set_permissions(&qemu, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let settings = world.path().join("c.toml");
    std::fs::write(&settings, format!("qemu = {qemu:?}\n")).unwrap();
    let settings = settings.to_str().unwrap();

    std::fs::write(world.path().join("initramfs"), "").unwrap();
    let (code, text) = world.fail(&["--config", settings, "run", "a"]);
    assert!(
        code == 1 && text.contains("initramfs") && text.contains("cargo xtask guest"),
        "{text}"
    );

    std::fs::write(world.path().join("kernel"), "no kernel").unwrap();
    let (_, text) = world.fail(&["--config", settings, "run", "a"]);
    assert!(
        text.contains("neither an ELF vmlinux") && text.contains("CAISSON_KERNEL"),
        "{text}"
    );

    std::fs::remove_file(world.path().join("kernel")).unwrap();
    let (_, text) = world.fail(&["--config", settings, "create", "a"]);
    assert!(
        text.contains("cannot read the guest's kernel") && text.contains("No such file"),
        "{text}"
    );
}

#[test]
fn where_nothing_can_run_a_machine_both_ways_out_are_named() {
    let world = World::new();
    let output = world.run(&["check", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    if found["machine"] == "native" {
        // Hardware virtualization works here, so nothing is missing.
        return;
    }
    let (code, text) = world.fail(&["run", "a"]);
    assert_eq!(code, 1);
    for part in ["kvm", "qemu-system-", "apt-get install"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let settings = world.path().join("c.toml");
    std::fs::write(&settings, "require_hardware = true\n").unwrap();
    let (code, text) = world.fail(&["--config", settings.to_str().unwrap(), "run", "a"]);
    assert!(code == 1 && text.contains("require_hardware"), "{text}");
}

#[test]
fn check_says_what_is_missing_and_fails_if_containers_cannot_run() {
    let world = World::new();
    std::fs::remove_file(world.path().join("kernel")).unwrap();
    let output = world.run(&["check"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("NEEDED  guest kernel"), "{text}");
    let output = world.run(&["check", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["ready"], false);
    let names: Vec<&str> = found["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|one| one["name"].as_str())
        .collect();
    for name in [
        "hypervisor",
        "emulator",
        "guest kernel",
        "guest initramfs",
        "cgroups",
        "tun device",
        "kvm device",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let world = World::new();
    let settings = world.path().join("c.toml");
    for (text, part) in [
        ("kernal = \"x\"", "kernal"),
        ("default_vcpus = 0", "from 1 to 32"),
    ] {
        std::fs::write(&settings, text).unwrap();
        // Several lines here: the cause shows the place in the file.
        let output = world.run(&["--config", settings.to_str().unwrap(), "check"]);
        let said = String::from_utf8(output.stderr).unwrap();
        let code = output.status.code().unwrap();
        assert!(code == 1 && said.contains(part), "{said}");
    }
}

#[test]
fn a_container_that_does_not_exist_is_said_so_with_runcs_codes() {
    let world = World::new();
    for (words, code) in [
        (&["state", "a"][..], 1),
        (&["start", "a"], 1),
        (&["kill", "a"], 1),
        (&["delete", "a"], 1),
        (&["ps", "a"], 1),
        (&["pause", "a"], 1),
        (&["resume", "a"], 1),
        (&["events", "--stats", "a"], 1),
        (&["update", "--memory", "64M", "a"], 1),
        // So that a caller can tell it from the command's own codes.
        (&["exec", "a", "ls"], 255),
    ] {
        let (got, text) = world.fail(words);
        assert_eq!(got, code, "{words:?}");
        assert!(text.contains("container a does not exist"), "{words:?}: {text}");
    }
    let output = world.run(&["delete", "--force", "a"]);
    assert!(output.status.success() && output.stderr.is_empty());
}

#[test]
fn what_cannot_be_in_a_vm_is_refused() {
    let world = World::new();
    let (_, text) = world.fail(&["run", "--preserve-fds", "2", "a"]);
    assert!(
        text.contains("cannot enter a VM") && text.contains("mount"),
        "{text}"
    );
    let (code, text) = world.fail(&["exec", "--cgroup", "sub", "a", "ls"]);
    assert!(code == 255 && text.contains("--cgroup"), "{text}");
    let mut terminal = config();
    terminal["process"]["terminal"] = json!(true);
    world.config(&terminal);
    let (_, text) = world.fail(&["create", "a"]);
    assert!(text.contains("--console-socket"), "{text}");
}

#[test]
fn a_command_line_that_is_none_is_corrected() {
    let world = World::new();
    for (words, part) in [
        (&["crate", "a"][..], "'create'"),
        (&["run", "--bundel", "b", "a"], "'--bundle'"),
        (&["run"], "<ID>"),
        (&["kill", "a", "FOO"], "unknown signal \"FOO\""),
        (&["kill", "a", "99"], "from 1 to 64"),
    ] {
        let output = world.run(words);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert!(
            text.starts_with("caisson: ") && text.contains(part),
            "{words:?}: {text}"
        );
    }
}

#[test]
fn errors_are_logged_as_engines_read_them_and_told_to_people() {
    let world = World::new();
    let log = world.path().join("log");
    let log = log.to_str().unwrap();
    let (_, text) = world.fail(&["--log", log, "--log-format", "json", "state", "a"]);
    assert_eq!(text, "caisson: container a does not exist\n");
    let line: Value = serde_json::from_str(&std::fs::read_to_string(log).unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert_eq!(line["msg"], "container a does not exist");
    let time = line["time"].as_str().unwrap();
    // Seconds and a zone, as in "2026-11-25T12:36:14Z".
    assert!(time.len() == 20 && time.ends_with('Z'), "{time}");

    std::fs::remove_file(log).unwrap();
    world.fail(&["--log", log, "state", "a"]);
    let line = std::fs::read_to_string(log).unwrap();
    assert!(
        line.ends_with(" level=error msg=\"container a does not exist\"\n"),
        "{line}"
    );

    // Without a file the line is all there is, in the format that was asked for.
    let output = world.run(&["--log-format", "json", "state", "a"]);
    let line: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(line["msg"], "container a does not exist");

    let (code, text) = world.fail(&["--log", "/nonexistent/log", "list"]);
    assert!(code == 1 && text.contains("/nonexistent/log"), "{text}");
}

#[test]
fn an_empty_list_looks_like_runcs() {
    let world = World::new();
    for (words, want) in [
        (&["list"][..], "ID   PID   STATUS   BUNDLE   CREATED   OWNER\n"),
        (&["list", "--quiet"], ""),
        (&["list", "--format", "json"], "null\n"),
    ] {
        assert_eq!(
            String::from_utf8(world.run(words).stdout).unwrap(),
            want,
            "{words:?}"
        );
    }
}

#[test]
fn the_version_is_where_dockerd_looks_for_it() {
    let text = String::from_utf8(World::new().run(&["--version"]).stdout).unwrap();
    assert!(text.starts_with("caisson version "), "{text}");
    assert!(text.contains("\nspec: 1.2."), "{text}");
}

#[test]
fn run_without_a_bundle_leaves_none_behind() {
    let world = World::new();
    let rootfs = world.path().join("bundle/rootfs");
    let rootfs = rootfs.to_str().unwrap();
    std::fs::remove_file(world.path().join("kernel")).unwrap();
    let (code, _) = world.fail(&["run", "--rootfs", rootfs, "--", "true"]);
    assert_eq!(code, 1);
    assert_eq!(std::fs::read_dir(world.path().join("root")).unwrap().count(), 0);
    let (_, text) = world.fail(&["run", "--rootfs", rootfs]);
    assert!(text.contains("after \"--\""), "{text}");
    let (_, text) = world.fail(&["run", "--rootfs", "/nonexistent/tree", "--", "true"]);
    assert!(text.contains("/nonexistent/tree"), "{text}");
    let (_, text) = world.fail(&["run", "--rootfs", rootfs, "--user", "nobody", "--", "true"]);
    assert!(text.contains("\"nobody\""), "{text}");
    let (_, text) = world.fail(&["run", "--rootfs", rootfs, "--volume", "/x", "--", "true"]);
    assert!(text.contains("HOST:CONTAINER"), "{text}");
}
