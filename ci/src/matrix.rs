//! The support table: what is claimed, and which part of the test holds each claim.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;

/// `ci/matrix.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Matrix {
    combination: Vec<Combination>,
}

/// One backend on one architecture and operating system.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Combination {
    backend: String,
    arch: String,
    os: String,
    tier: Tier,
    checks: Vec<String>,
    state: String,
}

/// How much is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Tier {
    #[serde(rename = "1")]
    Booted,
    #[serde(rename = "2")]
    Tested,
    #[serde(rename = "3")]
    Built,
    #[serde(rename = "planned")]
    Planned,
}

/// Prints the table, or writes it into the README.
pub(crate) fn run(root: &Path, write: bool) -> anyhow::Result<()> {
    let table = render(&read(root)?);
    if !write {
        print!("{table}");
        return Ok(());
    }
    let path = root.join("README.md");
    let text = fs::read_to_string(&path).context("cannot read README.md")?;
    let (before, _, after) = split(&text)?;
    fs::write(&path, format!("{before}{table}{after}")).context("cannot write README.md")
}

/// Claims that nothing holds, and a table that says something else. `parts` are the parts of the test.
pub(crate) fn findings(root: &Path, parts: &[&str]) -> anyhow::Result<Vec<String>> {
    let matrix = read(root)?;
    let mut findings = unheld(&matrix, parts);
    let text = fs::read_to_string(root.join("README.md")).context("cannot read README.md")?;
    let (_, table, _) = split(&text)?;
    if table != render(&matrix) {
        findings.push(
            "the support table in README.md differs from ci/matrix.toml: run \"cargo xtask matrix --write\""
                .to_owned(),
        );
    }
    Ok(findings)
}

fn unheld(matrix: &Matrix, parts: &[&str]) -> Vec<String> {
    let mut findings = Vec::new();
    for row in &matrix.combination {
        let name = format!("{} x {} x {}", row.backend, row.arch, row.os);
        if row.tier != Tier::Planned && row.checks.is_empty() {
            findings.push(format!("{name} has a tier but no part of the test checks it"));
        }
        for check in row.checks.iter().filter(|check| !parts.contains(&check.as_str())) {
            findings.push(format!(
                "{name} is checked by {check:?}, which is no part of the test"
            ));
        }
    }
    findings
}

fn read(root: &Path) -> anyhow::Result<Matrix> {
    let text = fs::read_to_string(root.join("ci/matrix.toml")).context("cannot read ci/matrix.toml")?;
    toml::from_str(&text).context("cannot understand ci/matrix.toml")
}

fn render(matrix: &Matrix) -> String {
    let mut table =
        "| hypervisor | architecture | host | tier | state | checked by |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for row in &matrix.combination {
        let tier = match row.tier {
            Tier::Booted => "1",
            Tier::Tested => "2",
            Tier::Built => "3",
            Tier::Planned => "planned",
        };
        let checks: Vec<_> = row
            .checks
            .iter()
            .map(|check| format!("`cargo xtask test {check}`"))
            .collect();
        let cells = [
            &row.backend,
            &row.arch,
            &row.os,
            tier,
            &row.state,
            &checks.join(", "),
        ];
        let row = cells.map(|cell| format!("| {cell} ")).concat();
        table.push_str(&format!("{row}|\n"));
    }
    table
}

/// The text before the table, the table, and the text after it.
fn split(text: &str) -> anyhow::Result<(&str, &str, &str)> {
    let parts = text.find(BEGIN).and_then(|at| {
        let begin = at + BEGIN.len();
        let length = text.get(begin..)?.find(END)?;
        Some((
            text.get(..begin)?,
            text.get(begin..begin + length)?,
            text.get(begin + length..)?,
        ))
    });
    let Some(parts) = parts else {
        bail!("README.md has no place for the support table; it lies between {BEGIN:?} and {END:?}");
    };
    Ok(parts)
}

const BEGIN: &str = "<!-- matrix -->\n";
const END: &str = "<!-- /matrix -->";

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(tier: &str, checks: &str) -> Matrix {
        toml::from_str(&format!(
            "[[combination]]\nbackend = \"KVM\"\narch = \"x86_64\"\nos = \"Linux\"\ntier = {tier:?}\n\
             checks = {checks}\nstate = \"boots\"\n"
        ))
        .unwrap()
    }

    #[test]
    fn a_claim_needs_a_part_of_the_test_that_exists() {
        let parts = ["lint", "emulate"];
        assert!(unheld(&matrix("1", "[\"emulate\"]"), &parts).is_empty());
        assert!(unheld(&matrix("planned", "[]"), &parts).is_empty());
        assert_eq!(unheld(&matrix("1", "[]"), &parts).len(), 1);
        assert_eq!(unheld(&matrix("2", "[\"mshv\"]"), &parts).len(), 1);
    }

    #[test]
    fn the_table_has_its_place() {
        let text = format!("a\n{BEGIN}| x |\n{END}\nb");
        let (_, table, after) = split(&text).unwrap();
        assert_eq!((table, after), ("| x |\n", "<!-- /matrix -->\nb"));
        split("no place").unwrap_err();
        assert!(
            render(&matrix("1", "[\"emulate\"]"))
                .contains("| KVM | x86_64 | Linux | 1 | boots | `cargo xtask test emulate` |")
        );
    }
}
