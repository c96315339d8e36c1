//! OCI's resource limits, which speak of cgroup v1, as files of cgroup v2.

use caisson_wire::agent::{Failure, Stage, Stats};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use rustix::io::Errno;

use super::cgroup::Cgroup;
use crate::failure::failure_with;

/// One file of a cgroup and what is written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) file: String,
    pub(crate) value: String,
    /// Whether a kernel without that file cannot keep the promise; false for limits on what such a kernel
    /// does not have.
    pub(crate) required: bool,
}

/// The settings that `resources` asks for, in the order of writing; devices are not among them.
///
/// # Errors
/// Fails for values that contradict each other or mean nothing.
pub(crate) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, Failure> {
    let mut list = List::default();
    if let Some(memory) = resources.memory() {
        add_memory(&mut list, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        add_cpu(&mut list, cpu);
    }
    if let Some(pids) = resources.pids() {
        list.required(
            "pids.max",
            limit(pids.limit())
                .filter(|value| value != "0")
                .unwrap_or_else(max),
        );
    }
    if let Some(io) = resources.block_io() {
        add_io(&mut list, io);
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let size = file_part(page.page_size())?;
        list.required(
            &format!("hugetlb.{size}.max"),
            limit(page.limit()).unwrap_or_else(max),
        );
        list.optional(
            &format!("hugetlb.{size}.rsvd.max"),
            limit(page.limit()).unwrap_or_else(max),
        );
    }
    for (device, rdma) in resources.rdma().iter().flatten() {
        let part =
            |key: &str, value: Option<u32>| value.map_or(String::new(), |value| format!(" {key}={value}"));
        let parts = part("hca_handle", rdma.hca_handles()) + &part("hca_object", rdma.hca_objects());
        list.required("rdma.max", format!("{device}{parts}"));
    }
    // Last, since they are meant literally and win over the converted ones.
    for (file, value) in resources.unified().iter().flatten() {
        let file = file_part(file)?;
        if file.starts_with("cgroup.") {
            return Err(refuse(format!("cannot set {file}: it is no resource limit")));
        }
        list.required(file, value.clone());
    }
    Ok(list.0)
}

fn add_memory(list: &mut List, memory: &LinuxMemory) -> Result<(), Failure> {
    if let Some(swap) = swap(memory.limit(), memory.swap())? {
        // A guest without swap has no such file, and nothing to limit.
        list.optional("memory.swap.max", swap);
    }
    if let Some(value) = memory.limit().filter(|limit| *limit != 0) {
        list.required("memory.max", limit(value).unwrap_or_else(max));
    }
    if let Some(value) = memory.reservation().filter(|limit| *limit != 0) {
        list.required("memory.low", limit(value).unwrap_or_else(max));
    }
    Ok(())
}

/// `memory.swap.max` from v1's limit on memory and swap together.
fn swap(memory: Option<i64>, both: Option<i64>) -> Result<Option<String>, Failure> {
    let (memory, both) = (memory.unwrap_or(0), both.unwrap_or(0));
    match both {
        0 => Ok(None),
        ..0 => Ok(Some(max())),
        _ if memory < 0 => Ok(Some(max())),
        _ if memory == 0 => Err(refuse("cannot limit swap without limiting memory".to_owned())),
        _ if both < memory => Err(refuse(format!(
            "cannot limit memory and swap together to {both}, which is less than memory alone, {memory}"
        ))),
        _ => Ok(Some(both.saturating_sub(memory).to_string())),
    }
}

fn add_cpu(list: &mut List, cpu: &LinuxCpu) {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        list.required("cpu.weight", weight_of_shares(shares).to_string());
    }
    if let Some(idle) = cpu.idle() {
        list.required("cpu.idle", idle.to_string());
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = cpu
            .quota()
            .filter(|quota| *quota > 0)
            .map_or_else(max, |quota| quota.to_string());
        let period = cpu
            .period()
            .filter(|period| *period != 0)
            .unwrap_or(DEFAULT_PERIOD);
        list.required("cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        list.required("cpu.max.burst", burst.to_string());
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        list.required("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        list.required("cpuset.mems", mems.clone());
    }
}

/// v1's shares (2 to 262144, 1024 by default) as v2's weight (1 to 10000, 100 by default): the curve through
/// those three points that runtimes have agreed on.
fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let shares = f64::from(u32::try_from(shares).unwrap_or(u32::MAX)).log2();
            let exponent = (shares * shares + 125.0 * shares) / 612.0 - 7.0 / 34.0;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 1 and 10000 by the bounds above"
            )]
            let weight = 10_f64.powf(exponent).ceil() as u64;
            weight.clamp(1, 10_000)
        }
    }
}

fn add_io(list: &mut List, io: &LinuxBlockIo) {
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        list.required("io.weight", format!("default {}", io_weight(weight)));
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let value = format!("{}:{} {}", device.major(), device.minor(), io_weight(weight));
            list.required("io.weight", value);
        }
    }
    let mut throttle = |key: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 {
                max()
            } else {
                device.rate().to_string()
            };
            list.required(
                "io.max",
                format!("{}:{} {key}={rate}", device.major(), device.minor()),
            );
        }
    };
    throttle("rbps", io.throttle_read_bps_device());
    throttle("wbps", io.throttle_write_bps_device());
    throttle("riops", io.throttle_read_iops_device());
    throttle("wiops", io.throttle_write_iops_device());
}

/// v1's 10 to 1000 on v2's 1 to 10000.
fn io_weight(weight: u16) -> u32 {
    let above = u32::from(weight.clamp(10, 1000)).saturating_sub(10);
    1 + above * 9999 / 990
}

/// A limit as v2 writes it; negative is none.
fn limit(value: i64) -> Option<String> {
    u64::try_from(value).ok().map(|value| value.to_string())
}

fn max() -> String {
    "max".to_owned()
}

/// A name that stays inside the cgroup's directory.
fn file_part(name: &str) -> Result<&str, Failure> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(refuse(format!("{name:?} is no file of a cgroup")));
    }
    Ok(name)
}

fn refuse(message: String) -> Failure {
    failure_with(Stage::Cgroup, Errno::INVAL, message)
}

#[derive(Default)]
struct List(Vec<Setting>);

impl List {
    fn required(&mut self, file: &str, value: String) {
        self.push(file, value, true);
    }

    fn optional(&mut self, file: &str, value: String) {
        self.push(file, value, false);
    }

    fn push(&mut self, file: &str, value: String, required: bool) {
        self.0.push(Setting {
            file: file.to_owned(),
            value,
            required,
        });
    }
}

/// Measures a container.
pub(crate) fn stats(cgroup: &Cgroup) -> Stats {
    let mut stats = Stats {
        memory_current: cgroup.number("memory.current").unwrap_or_default(),
        memory_peak: cgroup.number("memory.peak").unwrap_or_default(),
        memory_limit: cgroup.number("memory.max"),
        swap_current: cgroup.number("memory.swap.current").unwrap_or_default(),
        memory_stat: flat_keyed(&cgroup.text("memory.stat").unwrap_or_default())
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        oom_kills: cgroup.oom_kills(),
        pids_current: cgroup.number("pids.current").unwrap_or_default(),
        pids_limit: cgroup.number("pids.max"),
        io: io_stat(&cgroup.text("io.stat").unwrap_or_default()),
        ..Stats::default()
    };
    for (key, value) in flat_keyed(&cgroup.text("cpu.stat").unwrap_or_default()) {
        match key {
            "usage_usec" => stats.cpu_usage_us = value,
            "user_usec" => stats.cpu_user_us = value,
            "system_usec" => stats.cpu_system_us = value,
            "nr_periods" => stats.cpu_periods = value,
            "nr_throttled" => stats.cpu_throttled_periods = value,
            "throttled_usec" => stats.cpu_throttled_us = value,
            _ => {}
        }
    }
    stats
}

/// The lines `KEY VALUE` of a cgroup file.
pub(crate) fn flat_keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.parse().ok()?))
    })
}

/// The lines `MAJOR:MINOR rbytes=… wbytes=… rios=… wios=…` of `io.stat`.
fn io_stat(text: &str) -> Vec<(u32, u32, u64, u64, u64, u64)> {
    text.lines()
        .filter_map(|line| {
            let (device, values) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let value = |key: &str| {
                values
                    .split(' ')
                    .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
                    .unwrap_or_default()
            };
            Some((
                major.parse().ok()?,
                minor.parse().ok()?,
                value("rbytes"),
                value("wbytes"),
                value("rios"),
                value("wios"),
            ))
        })
        .collect()
}

/// The kernel's default of `cpu.max`, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn written(json: &str) -> Vec<(String, String)> {
        settings(&serde_json::from_str(json).unwrap())
            .unwrap()
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    #[test]
    fn limits_of_v1_become_files_of_v2() {
        for (json, want) in [
            (
                r#"{"memory": {"limit": 1048576}}"#,
                vec![("memory.max", "1048576")],
            ),
            (r#"{"memory": {"limit": -1}}"#, vec![("memory.max", "max")]),
            (
                r#"{"memory": {"limit": 100, "swap": 300, "reservation": 50}}"#,
                vec![
                    ("memory.swap.max", "200"),
                    ("memory.max", "100"),
                    ("memory.low", "50"),
                ],
            ),
            (
                r#"{"memory": {"limit": 100, "swap": 100}}"#,
                vec![("memory.swap.max", "0"), ("memory.max", "100")],
            ),
            (
                r#"{"memory": {"limit": 100, "swap": -1}}"#,
                vec![("memory.swap.max", "max"), ("memory.max", "100")],
            ),
            (r#"{"cpu": {"shares": 1024}}"#, vec![("cpu.weight", "100")]),
            (r#"{"cpu": {"quota": 50000}}"#, vec![("cpu.max", "50000 100000")]),
            (
                r#"{"cpu": {"quota": -1, "period": 20000}}"#,
                vec![("cpu.max", "max 20000")],
            ),
            (
                r#"{"cpu": {"cpus": "0-1", "mems": "0", "idle": 1, "burst": 7}}"#,
                vec![
                    ("cpu.idle", "1"),
                    ("cpu.max.burst", "7"),
                    ("cpuset.cpus", "0-1"),
                    ("cpuset.mems", "0"),
                ],
            ),
            (r#"{"pids": {"limit": 32}}"#, vec![("pids.max", "32")]),
            (r#"{"pids": {"limit": -1}}"#, vec![("pids.max", "max")]),
            (r#"{"pids": {"limit": 0}}"#, vec![("pids.max", "max")]),
            (
                r#"{"blockIO": {"weight": 1000, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}]}}"#,
                vec![("io.weight", "default 10000"), ("io.max", "8:0 rbps=5")],
            ),
            (
                r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": 4}]}"#,
                vec![("hugetlb.2MB.max", "4"), ("hugetlb.2MB.rsvd.max", "4")],
            ),
            (
                r#"{"unified": {"memory.high": "1M"}, "memory": {"limit": 9}}"#,
                vec![("memory.max", "9"), ("memory.high", "1M")],
            ),
        ] {
            let want: Vec<_> = want
                .into_iter()
                .map(|(file, value)| (file.to_owned(), value.to_owned()))
                .collect();
            assert_eq!(written(json), want, "{json}");
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        for json in [
            r#"{"memory": {"limit": 100, "swap": 50}}"#,
            r#"{"memory": {"swap": 50}}"#,
            r#"{"unified": {"../x": "1"}}"#,
            r#"{"unified": {"cgroup.procs": "1"}}"#,
            r#"{"hugepageLimits": [{"pageSize": "2/../", "limit": 4}]}"#,
        ] {
            let failed = settings(&serde_json::from_str(json).unwrap()).unwrap_err();
            assert_eq!(
                (failed.stage, failed.errno),
                (Stage::Cgroup, Some(libc::EINVAL)),
                "{json}"
            );
        }
    }

    #[test]
    fn weights_keep_the_ends_and_the_default() {
        for (shares, weight) in [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        for (v1, v2) in [(1, 1), (10, 1), (1000, 10_000)] {
            assert_eq!(io_weight(v1), v2, "{v1}");
        }
    }

    #[test]
    fn io_stat_lines_are_read_by_key() {
        assert_eq!(
            io_stat("254:0 wbytes=2 rbytes=1 rios=3 wios=4 dbytes=0 dios=0\n7:1 \nbroken\n"),
            [(254, 0, 1, 2, 3, 4), (7, 1, 0, 0, 0, 0)]
        );
    }
}
