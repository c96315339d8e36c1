//! `caisson events`.
#![expect(
    clippy::indexing_slicing,
    reason = "members of JSON objects that are made here; writing to a missing one adds it"
)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use caisson_sandbox::Measured;
use caisson_sandbox::client::{ControlError, Event, Runtime};
use serde_json::{Map, Value, json};

use crate::failure::Result;
use crate::units;

/// runc's figure for "no limit": the largest multiple of a page that fits a signed word.
const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// Options of `events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
    /// How often to measure: 5s, 500ms
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = units::duration)]
    interval: Duration,
    /// Measure once and leave
    #[arg(long)]
    stats: bool,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let id = super::id(&self.id)?;
        let measure = || -> std::result::Result<String, ControlError> {
            Ok(format!("{}\n", stats(id.as_str(), &runtime.stats(&id)?)))
        };
        if self.stats {
            return super::print(&measure()?);
        }
        let mut watch = runtime.watch(&id)?;
        let mut next = Instant::now() + self.interval;
        loop {
            match watch.next(next.saturating_duration_since(Instant::now()))? {
                Some(Event::OutOfMemory) => {
                    super::print(&format!("{}\n", json!({"type": "oom", "id": id.as_str()})))?;
                }
                Some(Event::Exited(_)) => return Ok(ExitCode::SUCCESS),
                None => {
                    match measure() {
                        Ok(line) => super::print(&line)?,
                        // It has just ended, which the next event says.
                        Err(ControlError::Status { .. }) => return Ok(ExitCode::SUCCESS),
                        Err(err) => return Err(err.into()),
                    };
                    next = Instant::now() + self.interval;
                }
            }
        }
    }
}

/// One line in the shape that runc has and engines read; times are in nanoseconds there.
fn stats(id: &str, measured: &Measured) -> Value {
    let own = &measured.container;
    let nanoseconds = |us: u64| us.saturating_mul(1000);
    let memory = |usage: u64, max: u64, limit: Option<u64>, failures: u64| json!({"limit": limit.unwrap_or(UNLIMITED), "usage": usage, "max": max, "failcnt": failures});
    let raw: Map<String, Value> = own
        .memory_stat
        .iter()
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    let kernel = own.memory_stat.get("kernel").copied().unwrap_or(0);
    let entry = |device: (u32, u32), op: &str, value: u64| json!({"major": device.0, "minor": device.1, "op": op, "value": value});
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    for (major, minor, read, written, reads, writes) in &own.io {
        let device = (*major, *minor);
        bytes.extend([entry(device, "Read", *read), entry(device, "Write", *written)]);
        operations.extend([entry(device, "Read", *reads), entry(device, "Write", *writes)]);
    }
    let mut blkio = Map::new();
    if !bytes.is_empty() {
        blkio.insert("ioServiceBytesRecursive".to_owned(), bytes.into());
        blkio.insert("ioServicedRecursive".to_owned(), operations.into());
    }
    let mut pids = json!({"current": own.pids_current});
    if let Some(limit) = own.pids_limit {
        pids["limit"] = limit.into();
    }
    let mut data = json!({
        "cpu": {
            "usage": {
                "total": nanoseconds(own.cpu_usage_us),
                "kernel": nanoseconds(own.cpu_system_us),
                "user": nanoseconds(own.cpu_user_us),
            },
            "throttling": {
                "periods": own.cpu_periods,
                "throttledPeriods": own.cpu_throttled_periods,
                "throttledTime": nanoseconds(own.cpu_throttled_us),
            },
        },
        "memory": {
            "cache": own.memory_stat.get("file").copied().unwrap_or(0),
            "usage": memory(own.memory_current, own.memory_peak, own.memory_limit, own.oom_kills),
            "swap": memory(own.swap_current, 0, None, 0),
            "kernel": memory(kernel, 0, None, 0),
            "kernelTCP": {"limit": UNLIMITED, "failcnt": 0},
            "raw": raw,
        },
        "pids": pids,
        "blkio": blkio,
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
    });
    if let Some(machine) = &measured.machine {
        // Beyond runc: what the machine takes of the host.
        data["machine"] = json!({
            "guestResident": machine.guest_resident,
            "vcpu": nanoseconds(machine.vcpu_us),
        });
    }
    json!({"type": "stats", "id": id, "data": data})
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_wire::agent::Stats;

    #[test]
    fn the_shape_is_that_of_runc() {
        let measured = Measured {
            container: Stats {
                cpu_usage_us: 3,
                memory_current: 10,
                memory_peak: 20,
                memory_limit: Some(100),
                pids_current: 2,
                io: vec![(254, 0, 1, 2, 3, 4)],
                ..Stats::default()
            },
            machine: None,
        };
        let line = stats("a", &measured);
        assert_eq!(line["type"], "stats");
        assert_eq!(line["id"], "a");
        let data = &line["data"];
        // As `runc events --stats` of version 1.1.5 prints it.
        for member in [
            "cpu",
            "memory",
            "pids",
            "blkio",
            "hugetlb",
            "intel_rdt",
            "network_interfaces",
        ] {
            assert!(data.get(member).is_some(), "{member}");
        }
        assert_eq!(data["cpu"]["usage"]["total"], 3000);
        assert_eq!(
            data["memory"]["usage"],
            json!({"limit": 100, "usage": 10, "max": 20, "failcnt": 0})
        );
        assert_eq!(data["memory"]["swap"]["limit"], UNLIMITED);
        assert_eq!(data["pids"], json!({"current": 2}));
        assert_eq!(
            data["blkio"]["ioServiceBytesRecursive"][1],
            json!({"major": 254, "minor": 0, "op": "Write", "value": 2})
        );
    }

    #[test]
    fn a_container_without_disks_has_an_empty_member() {
        assert_eq!(stats("a", &Measured::default())["data"]["blkio"], json!({}));
    }
}
