//! The root file system and volumes.

use std::os::unix::fs::MetadataExt as _;

use serde_json::json;

use crate::world::World;

#[test]
fn files_made_inside_are_what_the_host_sees() {
    let world = World::new();
    let script = "set -e; cd /home; echo text > a; ln a b; ln -s ../etc/passwd link; mkdir -p d/e; mkfifo pipe; \
        chown 1234:5678 a; chmod 4751 d/e; dd if=/dev/zero of=sparse bs=1 count=1 seek=5G 2>/dev/null; \
        mv d moved; i=0; while [ $i -lt 1000 ]; do : > moved/$i; i=$((i+1)); done; ls moved | wc -l; \
        (echo to-pipe > pipe &) ; cat pipe; sync; stat -c '%u %g %h %s' a sparse";
    let outcome = world.run_script(script, |config| {
        let all = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_MKNOD"
        ]);
        config["process"]["capabilities"] = json!({ "bounding": all, "effective": all, "permitted": all });
    });
    assert_eq!(
        outcome.stdout, "1001\nto-pipe\n1234 5678 2 5\n0 0 1 5368709121\n",
        "{outcome:?}"
    );
    let home = world.directory.path().join("bundle/rootfs/home");
    let file = std::fs::metadata(home.join("b")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.nlink()), (1234, 5678, 2));
    assert_eq!(
        std::fs::read_link(home.join("link")).unwrap().to_str(),
        Some("../etc/passwd")
    );
    assert_eq!(
        std::fs::metadata(home.join("moved/e")).unwrap().mode() & 0o7777,
        0o4751
    );
    let sparse = std::fs::metadata(home.join("sparse")).unwrap();
    assert!(sparse.len() == (5 << 30) + 1 && sparse.blocks() < 1000);
}

#[test]
fn volumes_are_shared_and_read_only_ones_are_so() {
    let world = World::new();
    let volume = world.directory.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("from-host"), "host").unwrap();
    let outcome = world.run_script(
        "cat /mnt/rw/from-host; echo guest > /mnt/rw/from-guest; (echo x > /mnt/ro/x) 2>&1; cat /etc/one",
        |config| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(json!({ "destination": "/mnt/rw", "type": "bind", "source": volume, "options": ["rbind", "rw"] }));
            mounts.push(json!({ "destination": "/mnt/ro", "type": "bind", "source": volume, "options": ["bind", "ro"] }));
            mounts.push(json!({ "destination": "/etc/one", "type": "bind", "source": volume.join("from-host"), "options": ["bind"] }));
        },
    );
    assert!(
        outcome.stdout.starts_with("host") && outcome.stdout.ends_with("host"),
        "{outcome:?}"
    );
    assert!(outcome.stdout.contains("Read-only file system"), "{outcome:?}");
    assert_eq!(
        std::fs::read_to_string(volume.join("from-guest")).unwrap(),
        "guest\n"
    );
}

#[test]
fn a_link_inside_never_leads_to_the_host() {
    let world = World::new();
    let secret = world.directory.path().join("secret");
    std::fs::write(&secret, "the host's").unwrap();
    let bundle = world.bundle("b", "cat /mnt/link /mnt/up/secret; ls /mnt/up 2>&1", |_| {});
    let mnt = std::path::Path::new(&bundle).join("rootfs/mnt");
    std::os::unix::fs::symlink(&secret, mnt.join("link")).unwrap();
    std::os::unix::fs::symlink("../../../../../../../../../..", mnt.join("up")).unwrap();
    let outcome = world.run(&["run", "--bundle", &bundle, "c"]);
    assert!(!outcome.stdout.contains("the host's"), "{outcome:?}");
    assert!(
        outcome.stdout.contains("bin"),
        "the guest's own root is not there: {outcome:?}"
    );
}
