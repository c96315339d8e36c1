//! `caisson update`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use caisson_sandbox::bundle::read_json;
use caisson_sandbox::client::Runtime;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use crate::failure::Result;
use crate::units;

/// Options of `update`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
    /// File with the resources as config.json has them, or - for standard input; then no other option counts
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Memory limit; -1 is none
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = units::bytes)]
    memory: Option<i64>,
    /// Memory that is kept for the container under pressure
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = units::bytes)]
    memory_reservation: Option<i64>,
    /// Memory and swap together; -1 is no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = units::bytes)]
    memory_swap: Option<i64>,
    /// Processor time in each period, in microseconds; -1 is no limit
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// Period in microseconds
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// Processor time that may be saved up, in microseconds
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,
    /// Relative weight, 1024 being usual
    #[arg(long, value_name = "N")]
    cpu_share: Option<u64>,
    /// Run only when nothing else does: 1, or 0
    #[arg(long, value_name = "0|1", value_parser = clap::value_parser!(i64).range(0..=1))]
    cpu_idle: Option<i64>,
    /// Real-time period in microseconds
    #[arg(long, value_name = "US")]
    cpu_rt_period: Option<u64>,
    /// Real-time processor time in each period, in microseconds
    #[arg(long, value_name = "US")]
    cpu_rt_runtime: Option<i64>,
    /// Processors of the guest the container may use: 0-2,5
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the guest the container may use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Most processes; -1 is no limit
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Relative weight of block I/O, from 10 to 1000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(10..=1000))]
    blkio_weight: Option<u16>,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let id = super::id(&self.id)?;
        let resources = match &self.resources {
            Some(path) => read_json(path)?,
            None => self.asked()?,
        };
        runtime.update(&id, resources)?;
        Ok(ExitCode::SUCCESS)
    }

    fn asked(&self) -> anyhow::Result<LinuxResources> {
        let mut asked = Map::new();
        let mut group = |name: &str, members: &[(&str, Value)]| {
            let given: Map<String, Value> = members
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| ((*key).to_owned(), value.clone()))
                .collect();
            if !given.is_empty() {
                asked.insert(name.to_owned(), given.into());
            }
        };
        group(
            "memory",
            &[
                ("limit", json!(self.memory)),
                ("reservation", json!(self.memory_reservation)),
                ("swap", json!(self.memory_swap)),
            ],
        );
        group(
            "cpu",
            &[
                ("quota", json!(self.cpu_quota)),
                ("period", json!(self.cpu_period)),
                ("burst", json!(self.cpu_burst)),
                ("shares", json!(self.cpu_share)),
                ("idle", json!(self.cpu_idle)),
                ("realtimePeriod", json!(self.cpu_rt_period)),
                ("realtimeRuntime", json!(self.cpu_rt_runtime)),
                ("cpus", json!(self.cpuset_cpus)),
                ("mems", json!(self.cpuset_mems)),
            ],
        );
        group("pids", &[("limit", json!(self.pids_limit))]);
        group("blockIO", &[("weight", json!(self.blkio_weight))]);
        if asked.is_empty() {
            bail!("no limit to change; give one, or a file with --resources");
        }
        serde_json::from_value(asked.into()).context("cannot make resources of the options")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn asked(words: &str) -> anyhow::Result<Value> {
        let line = Line::try_parse_from(words.split(' ')).map_err(anyhow::Error::from)?;
        Ok(serde_json::to_value(line.options.asked()?).unwrap())
    }

    #[test]
    fn each_option_becomes_its_member_and_nothing_else() {
        for (words, want) in [
            (
                "update --memory 100M a",
                json!({"memory": {"limit": 104_857_600}}),
            ),
            (
                "update --memory -1 --memory-swap=-1 a",
                json!({"memory": {"limit": -1, "swap": -1}}),
            ),
            (
                "update --memory-reservation 1k a",
                json!({"memory": {"reservation": 1024}}),
            ),
            (
                "update --cpu-quota 5000 --cpu-period 10000 --cpu-share 2 --cpu-idle 1 --cpu-burst 7 a",
                json!({"cpu": {"quota": 5000, "period": 10000, "shares": 2, "idle": 1, "burst": 7}}),
            ),
            (
                "update --cpuset-cpus 0-1 --cpuset-mems 0 a",
                json!({"cpu": {"cpus": "0-1", "mems": "0"}}),
            ),
            ("update --pids-limit 5 a", json!({"pids": {"limit": 5}})),
            ("update --blkio-weight 100 a", json!({"blockIO": {"weight": 100}})),
        ] {
            assert_eq!(asked(words).unwrap(), want, "{words}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            "update a",
            "update --memory x a",
            "update --cpu-idle 2 a",
            "update --blkio-weight 1 a",
        ] {
            assert!(asked(words).is_err(), "{words}");
        }
    }
}
