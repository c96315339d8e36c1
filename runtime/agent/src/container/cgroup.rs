//! A container's cgroup (Documentation/admin-guide/cgroup-v2.rst).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::LinuxResources;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::device_filter;
use super::resources::{self, Setting};
use crate::failure::{At, failure};
use crate::sys;

/// Enables every controller for the children of the cgroup at `root`.
pub(crate) fn delegate(root: &Path) {
    let available = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        // One at a time: a controller that is in use elsewhere keeps only itself back, and a limit that
        // needs it fails by name when it is set.
        drop(fs::write(
            root.join("cgroup.subtree_control"),
            format!("+{controller}"),
        ));
    }
}

/// A cgroup that exists as long as this does.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// The device filter, kept so that another one can take its place.
    devices: Mutex<Option<OwnedFd>>,
}

impl Cgroup {
    /// Makes the cgroup `name`, an invented one, below `root`.
    ///
    /// # Errors
    /// As mkdir(2).
    pub(crate) fn create(root: &Path, name: &str) -> Result<Self, Failure> {
        let path = root.join(name);
        fs::create_dir(&path).at(Stage::Cgroup, || "cannot create the cgroup")?;
        Ok(Self {
            path,
            devices: Mutex::new(None),
        })
    }

    /// Sets limits; those that `resources` does not name stay.
    ///
    /// # Errors
    /// Fails for a value that means nothing, and if the kernel lacks the controller or refuses the value.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), Failure> {
        if let Some(memory) = resources.memory()
            && memory.check_before_update().unwrap_or(false)
            && let (Some(limit), Some(current)) = (
                memory.limit().and_then(|limit| u64::try_from(limit).ok()),
                self.number("memory.current"),
            )
            && current > limit
        {
            let text = format!("cannot limit memory to {limit}: {current} are in use");
            return Err(failure(Stage::Cgroup, text));
        }
        for Setting {
            file,
            value,
            required,
        } in resources::settings(resources)?
        {
            match fs::write(self.path.join(&file), &value) {
                Err(err) if !required && err.kind() == io::ErrorKind::NotFound => {}
                other => other.at(Stage::Cgroup, || format!("cannot set {file} to {value:?}"))?,
            }
        }
        Ok(())
    }

    /// Lets the processes use the devices that `resources` allows and those that every container may, and
    /// no others.
    ///
    /// # Errors
    /// Fails if the kernel cannot do that.
    pub(crate) fn filter_devices(&self, resources: Option<&LinuxResources>) -> Result<(), Failure> {
        let cannot = || "cannot limit the devices";
        let program =
            sys::bpf_load_cgroup_device(&device_filter::program(resources)).at(Stage::Cgroup, cannot)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let cgroup = rustix::fs::open(&self.path, flags, Mode::empty()).at(Stage::Cgroup, cannot)?;
        sys::bpf_attach_cgroup_device(cgroup.as_fd(), program.as_fd()).at(Stage::Cgroup, cannot)?;
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        // All programs must agree, so between attach and detach less is allowed rather than more.
        if let Some(old) = devices.replace(program) {
            sys::bpf_detach_cgroup_device(cgroup.as_fd(), old.as_fd()).at(Stage::Cgroup, cannot)?;
        }
        Ok(())
    }

    /// Moves a process here.
    ///
    /// # Errors
    /// As writing `cgroup.procs`.
    pub(crate) fn add(&self, pid: u32) -> Result<(), Failure> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .at(Stage::Cgroup, || "cannot enter the cgroup")
    }

    /// Every process here and in the cgroups that the container made below.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect(&self.path, &mut pids, DEEPEST);
        pids
    }

    /// Kills every process here and below.
    ///
    /// # Errors
    /// As writing `cgroup.kill`.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Freezes or thaws every process here and below, and waits until it is so.
    ///
    /// # Errors
    /// Fails if it is not so within [`FREEZE_LIMIT`]; then the processes are as before.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Failure> {
        let word = if frozen { "freeze" } else { "thaw" };
        let cannot = || format!("cannot {word} the container");
        let file = self.path.join("cgroup.freeze");
        let value = |frozen| if frozen { "1" } else { "0" };
        fs::write(&file, value(frozen)).at(Stage::Control, cannot)?;
        let want = format!("frozen {}", value(frozen));
        let reached = self.wait_for_event(FREEZE_LIMIT, |events| events.lines().any(|line| line == want));
        match reached {
            Ok(true) => Ok(()),
            other => {
                drop(fs::write(&file, value(!frozen)));
                other.and(Err(Errno::TIMEDOUT.into())).at(Stage::Control, cannot)
            }
        }
    }

    /// Removes the cgroup and those below it; kills what is still in them.
    ///
    /// # Errors
    /// Fails if processes are left after [`REMOVE_LIMIT`].
    pub(crate) fn remove(&self) -> Result<(), Failure> {
        if !self.path.exists() {
            return Ok(());
        }
        // A frozen process is killed too, but let no later reader wonder.
        drop(fs::write(self.path.join("cgroup.freeze"), "0"));
        drop(self.kill());
        let empty = self.wait_for_event(REMOVE_LIMIT, |events| {
            events.lines().any(|line| line == "populated 0")
        });
        drop(empty); // what is wrong shows in the removal itself
        remove_tree(&self.path, DEEPEST).at(Stage::Cgroup, || "cannot remove the cgroup")
    }

    /// The text of a file of the cgroup.
    pub(crate) fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// The number in a file of the cgroup; `max` is none.
    pub(crate) fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// How often the kernel has killed a process here for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = self.text("memory.events").unwrap_or_default();
        resources::flat_keyed(&events)
            .find(|(key, _)| *key == "oom_kill")
            .map_or(0, |(_, count)| count)
    }

    /// Opens a file that can be polled for changes.
    pub(crate) fn open(&self, file: &str) -> io::Result<fs::File> {
        fs::File::open(self.path.join(file))
    }

    fn wait_for_event(&self, limit: Duration, holds: impl Fn(&str) -> bool) -> io::Result<bool> {
        let events = self.open("cgroup.events")?;
        let deadline = Instant::now() + limit;
        loop {
            // Read through the polled descriptor: that is what re-arms it (cgroup files, kernfs).
            if holds(&read_start(&events)?) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let mut polled = [PollFd::new(&events, PollFlags::PRI)];
            match rustix::event::poll(&mut polled, Some(&Timespec::try_from(left).unwrap_or_default())) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Whoever cares has called `remove` and has seen its error.
        drop(self.remove());
    }
}

/// The file from its beginning, wherever its position is.
pub(crate) fn read_start(file: &fs::File) -> io::Result<String> {
    let mut buffer = [0; 4096];
    let count = std::os::unix::fs::FileExt::read_at(file, &mut buffer, 0)?;
    Ok(String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned())
}

fn collect(path: &Path, pids: &mut Vec<i32>, depth: u32) {
    let Some(depth) = depth.checked_sub(1) else { return };
    let listed = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    pids.extend(
        listed
            .lines()
            .filter_map(|line| line.parse::<i32>().ok())
            .filter(|pid| *pid > 0),
    );
    for child in children(path) {
        collect(&child, pids, depth);
    }
}

fn remove_tree(path: &Path, depth: u32) -> io::Result<()> {
    let depth = depth
        .checked_sub(1)
        .ok_or_else(|| io::Error::other("cgroups are nested too deeply"))?;
    for child in children(path) {
        remove_tree(&child, depth)?;
    }
    match fs::remove_dir(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn children(path: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

/// Longest time until a container is frozen: a process in an uninterruptible wait freezes only after it.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Longest time until killed processes are gone.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);
/// Deepest nesting of cgroups that a container may have made and that is followed.
const DEEPEST: u32 = 64;
