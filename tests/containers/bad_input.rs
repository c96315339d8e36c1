//! Wrong ways: each ends with a message that says what failed, why and what to do, and leaves nothing.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::world::{Outcome, World, finish, needed};

/// The command failed with `code`, and its message has every one of `words`.
fn assert_says(outcome: &Outcome, code: i32, words: &[&str]) {
    assert_eq!(outcome.status.code(), Some(code), "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{word:?} is not said: {outcome:?}");
    }
}

#[test]
fn bundles_that_are_none() {
    let world = World::new();
    let at = |name: &str| world.directory.path().join(name).to_str().unwrap().to_owned();
    let run = |bundle: &str| world.run(&["run", "--bundle", bundle, "c"]);
    assert_says(&run(&at("none")), 1, &["none", "--bundle"]);
    std::fs::create_dir(at("empty")).unwrap();
    assert_says(&run(&at("empty")), 1, &["config.json", "caisson spec"]);
    std::fs::create_dir(at("invalid")).unwrap();
    std::fs::write(at("invalid/config.json"), "{\"ociVersion\": \"1.0.2\", ").unwrap();
    assert_says(&run(&at("invalid")), 1, &["config.json", "line 1"]);
    let bundle = world.bundle("version", "true", |config| config["ociVersion"] = "2.0.0".into());
    assert_says(&run(&bundle), 1, &["2.0.0"]);
    let bundle = world.bundle("rootless", "true", |config| {
        config["root"]["path"] = "elsewhere".into()
    });
    assert_says(&run(&bundle), 1, &["elsewhere"]);
    let bundle = world.bundle("no-args", "true", |config| config["process"]["args"] = json!([]));
    assert_says(&run(&bundle), 1, &["args"]);
    let bundle = world.bundle("mount", "true", |config| {
        let mount = json!({ "destination": "/mnt", "type": "bind", "source": "/no/such/source" });
        config["mounts"].as_array_mut().unwrap().push(mount);
    });
    assert_says(&run(&bundle), 1, &["/no/such/source", "/mnt"]);
    let bundle = world.bundle("limit", "true", |config| {
        config["linux"]["resources"]["memory"] = json!({ "limit": 5 });
    });
    assert_says(&run(&bundle), 1, &["memory", "5"]);
    let bundle = world.bundle("annotation", "true", |config| {
        config["annotations"] = json!({ "io.caisson.vcpu": "2" });
    });
    assert_says(&run(&bundle), 1, &["io.caisson.vcpu"]);
    world.assert_nothing_left();
}

#[test]
fn ids_that_are_none() {
    let world = World::new();
    let bundle = world.bundle("b", "true", |_| {});
    let long = "a".repeat(4096);
    for id in ["a/b", "..", ".", "", &long] {
        let outcome = world.run(&["run", "--bundle", &bundle, id]);
        assert_eq!(outcome.status.code(), Some(1), "{id:.20}: {outcome:?}");
        assert!(outcome.stderr.len() < 1000, "{outcome:?}");
    }
    world.assert_nothing_left();
}

#[test]
fn an_id_in_use_stays_with_its_owner() {
    let world = World::new();
    world.start_sleeper("c", |_| {});
    let bundle = world.bundle("b", "true", |_| {});
    assert_says(
        &world.run(&["run", "--bundle", &bundle, "c"]),
        1,
        &["c exists", "delete"],
    );
    assert_eq!(world.state("c")["status"], "running");
    world.ok(&["delete", "--force", "c"]);
    world.assert_nothing_left();
}

#[test]
fn programs_that_are_none() {
    let world = World::new();
    let bundle = world.bundle_of("missing", &["/no/such/program"], |_| {});
    assert_says(
        &world.run(&["run", "--bundle", &bundle, "c"]),
        127,
        &["/no/such/program"],
    );
    let bundle = world.bundle_of("plain", &["/etc/passwd"], |_| {});
    assert_says(
        &world.run(&["run", "--bundle", &bundle, "c"]),
        126,
        &["/etc/passwd"],
    );
    world.assert_nothing_left();
}

#[test]
fn guests_that_cannot_boot() {
    let world = World::new();
    let bundle = world.bundle("b", "true", |_| {});
    let at = |name: &str| world.directory.path().join(name);
    let run = |kernel: &Path, initramfs: &Path| {
        finish(
            world
                .caisson(&["run", "--bundle", &bundle, "c"])
                .env("CAISSON_KERNEL", kernel)
                .env("CAISSON_INITRAMFS", initramfs),
        )
    };
    let (kernel, initramfs) = (needed("CAISSON_KERNEL"), needed("CAISSON_INITRAMFS"));
    let (kernel, initramfs) = (Path::new(&kernel), Path::new(&initramfs));
    assert_says(&run(&at("none"), initramfs), 1, &["kernel", "none"]);
    assert_says(&run(kernel, &at("none")), 1, &["initramfs", "none"]);
    std::fs::write(at("text"), "no kernel at all\n".repeat(4096)).unwrap();
    assert_says(&run(&at("text"), initramfs), 1, &["kernel"]);
    // A kernel without an init panics; the console says so and we say the console.
    let panicked = run(kernel, &at("text"));
    assert_says(&panicked, 1, &["panic"]);
    world.assert_nothing_left();
}

#[test]
fn a_machine_without_anything_to_run_guests_says_how_to_get_it() {
    let world = World::new();
    let bundle = world.bundle("b", "true", |_| {});
    let config = world.directory.path().join("config.toml");
    std::fs::write(&config, "require_hardware = true\n").unwrap();
    if hardware() {
        return; // Nothing is missing there.
    }
    let mut refused = world.caisson(&[
        "--config",
        config.to_str().unwrap(),
        "run",
        "--bundle",
        &bundle,
        "c",
    ]);
    assert_says(&finish(&mut refused), 1, &["require_hardware", "hardware"]);
    let mut missing = world.caisson(&["run", "--bundle", &bundle, "c"]);
    assert_says(
        &finish(missing.env("PATH", "/nonexistent")),
        1,
        &["qemu-system-x86"],
    );
    world.assert_nothing_left();
}

/// Whether hardware virtualization is usable, by the runtime's own word.
fn hardware() -> bool {
    let out = Command::new(needed("CAISSON_BIN"))
        .args(["check", "--json"])
        .output()
        .unwrap();
    let told: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let findings = told["findings"].as_array().cloned().unwrap_or_default();
    let found = findings
        .iter()
        .find(|finding| finding["name"] == "hypervisor")
        .unwrap_or_else(|| panic!("{told}"));
    found["verdict"] == "works"
}

#[test]
fn files_of_settings_with_unknown_keys_are_refused() {
    let world = World::new();
    let config = world.directory.path().join("config.toml");
    std::fs::write(&config, "kernal = \"/x\"\n").unwrap();
    let outcome = world.run(&["--config", config.to_str().unwrap(), "list"]);
    let bundle = world.bundle("b", "true", |_| {});
    let outcome = match outcome.status.success() {
        true => world.run(&[
            "--config",
            config.to_str().unwrap(),
            "run",
            "--bundle",
            &bundle,
            "c",
        ]),
        false => outcome,
    };
    assert_says(&outcome, 1, &["kernal", "config.toml"]);
}
