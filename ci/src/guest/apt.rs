//! Packages of the distribution, downloaded and unpacked but never installed.
//!
//! Works with package lists of its own, made from the machine's own sources, so that the machine's
//! configuration stays as it is and suites that it does not follow can be read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::cache::Cache;
use crate::child;

/// Our own view of the distribution's packages.
#[derive(Debug)]
pub(crate) struct Apt {
    directory: PathBuf,
    suites: Vec<String>,
}

/// A package in one version.
#[derive(Clone, Debug)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// Packages that this one depends on, by name.
    pub(crate) depends: Vec<String>,
}

impl Apt {
    /// Reads the lists of the distribution's release and of its backports, if the sources have any.
    pub(crate) fn open(cache: &Cache) -> anyhow::Result<Self> {
        let directory = cache.state("apt")?;
        for part in ["lists/partial", "archives/partial", "sources"] {
            fs::create_dir_all(directory.join(part))?;
        }
        fs::write(directory.join("status"), "")?; // what is installed here does not matter
        let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .map(|name| name.trim_matches('"').to_owned())
            .context("/etc/os-release names no release; guest kernels are taken from Debian's packages")?;
        let source = Source::of(&system_sources()?, &codename).with_context(|| {
            format!("no source in /etc/apt has the suite {codename}; guest kernels are taken from there")
        })?;
        let backports = format!("{codename}-backports");
        for suites in [vec![codename.clone(), backports], vec![codename.clone()]] {
            let apt = Self {
                directory: directory.clone(),
                suites,
            };
            match apt.refresh(&source) {
                Ok(()) => return Ok(apt),
                Err(err) if apt.suites.len() == 1 => return Err(err),
                Err(err) => println!("no backports, so the release's own kernel is taken: {err:#}"),
            }
        }
        bail!("no suite of {codename} can be read")
    }

    /// The release's own suite.
    pub(crate) fn stable(&self) -> &str {
        self.suites.first().map_or("", String::as_str)
    }

    /// The suite with the newest kernels.
    pub(crate) fn newest(&self) -> &str {
        self.suites.last().map_or("", String::as_str)
    }

    /// Finds `name` in `suite`.
    pub(crate) fn find(&self, name: &str, suite: &str) -> anyhow::Result<Package> {
        let text = child::output(self.command("apt-cache").args([
            "show",
            "--no-all-versions",
            &format!("{name}/{suite}"),
        ]))
        .with_context(|| format!("no package {name} in {suite}"))?;
        let field = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
        };
        let depends = field("Depends").unwrap_or_default();
        Ok(Package {
            name: name.to_owned(),
            version: field("Version")
                .with_context(|| format!("{name} has no version"))?
                .to_owned(),
            depends: depends
                .split(',')
                .filter_map(|word| word.split_whitespace().next())
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Downloads `package` and unpacks it into `target`.
    pub(crate) fn unpack(&self, package: &Package, target: &Path) -> anyhow::Result<()> {
        let download = tempfile::tempdir_in(&self.directory)?;
        let wanted = format!("{}={}", package.name, package.version);
        let fetch = || {
            child::output(
                self.command("apt-get")
                    .args(["--quiet", "download", &wanted])
                    .current_dir(download.path()),
            )
        };
        if let Err(err) = fetch() {
            // The mirror may have dropped the version that the lists still name.
            self.update()?;
            fetch().with_context(|| format!("cannot download {wanted}, nor could it before: {err:#}"))?;
        }
        let file = fs::read_dir(download.path())?
            .next()
            .context("apt-get downloaded nothing")??
            .path();
        child::output(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(target))?;
        Ok(())
    }

    /// Writes the sources and reads the lists, unless that was done with the same sources lately.
    fn refresh(&self, source: &Source) -> anyhow::Result<()> {
        let file = self.directory.join("sources/distribution.sources");
        let text = source.render(&self.suites);
        let read = self.directory.join("lists/read");
        let fresh = fs::metadata(&read)
            .and_then(|data| data.modified())
            .ok()
            .and_then(|at| at.elapsed().ok())
            .is_some_and(|age| age < LISTS_LAST);
        if fresh && fs::read_to_string(&file).is_ok_and(|old| old == text) {
            return Ok(());
        }
        fs::write(&file, text)?;
        match self.update() {
            Ok(()) => fs::write(&read, "").context("cannot note that the lists were read"),
            // Without a network, old lists name what the cache may hold.
            Err(err) if read.exists() => {
                println!("package lists could not be renewed, the old ones serve: {err:#}");
                Ok(())
            }
            Err(err) => Err(err),
        }
    }

    fn update(&self) -> anyhow::Result<()> {
        child::output(
            self.command("apt-get")
                .args(["--quiet", "--error-on=any", "update"]),
        )
        .map(drop)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let at = |name: &str| self.directory.join(name).display().to_string();
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={}", at("sources")),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("")),
            // The directories are the caller's, who need not let another user write there.
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("LC_ALL", "C");
        command
    }
}

/// Where packages of the distribution come from.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    uris: String,
    signed_by: Option<String>,
}

impl Source {
    /// The first source that has the suite `codename`.
    fn of(text: &[SourceText], codename: &str) -> Option<Self> {
        text.iter().find_map(|text| match text {
            SourceText::Stanzas(text) => text
                .split("\n\n")
                .find_map(|stanza| Self::stanza(stanza, codename)),
            SourceText::Lines(text) => text.lines().find_map(|line| Self::line(line, codename)),
        })
    }

    /// Reads the format of sources.list(5), "DEB822-STYLE FORMAT".
    fn stanza(text: &str, codename: &str) -> Option<Self> {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if line.starts_with([' ', '\t']) {
                let (_, value) = fields.last_mut()?;
                value.push('\n');
                value.push_str(line);
            } else if let Some((key, value)) = line.split_once(':') {
                fields.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let field = |key: &str| {
            fields
                .iter()
                .find(|(name, _)| name == key)
                .map(|(_, value)| value)
        };
        let has = |key: &str, word: &str| {
            field(key).is_some_and(|value| value.split_whitespace().any(|part| part == word))
        };
        if field("enabled").is_some_and(|value| value == "no")
            || !has("types", "deb")
            || !has("suites", codename)
            || !has("components", "main")
        {
            return None;
        }
        Some(Self {
            uris: field("uris")?.clone(),
            signed_by: field("signed-by").cloned(),
        })
    }

    /// Reads the format of sources.list(5), "ONE-LINE-STYLE FORMAT".
    fn line(line: &str, codename: &str) -> Option<Self> {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        if suite != codename || !words.any(|word| word == "main") {
            return None;
        }
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(str::to_owned);
        Some(Self {
            uris: uri.to_owned(),
            signed_by,
        })
    }

    fn render(&self, suites: &[String]) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
            self.uris,
            suites.join(" ")
        );
        if let Some(key) = &self.signed_by {
            text.push_str(&format!("Signed-By: {key}\n"));
        }
        text
    }
}

/// A file of sources in one of the two formats.
#[derive(Debug)]
enum SourceText {
    Stanzas(String),
    Lines(String),
}

fn system_sources() -> anyhow::Result<Vec<SourceText>> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    paths.sort();
    let mut texts = Vec::new();
    for path in paths {
        let format: fn(String) -> SourceText = match path.extension().and_then(|end| end.to_str()) {
            Some("list") => SourceText::Lines,
            Some("sources") => SourceText::Stanzas,
            _ => continue,
        };
        if let Ok(text) = fs::read_to_string(&path) {
            texts.push(format(text));
        }
    }
    if texts.is_empty() {
        bail!("/etc/apt has no sources; guest kernels are taken from Debian's packages");
    }
    Ok(texts)
}

/// How long lists are used before they are read again.
const LISTS_LAST: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "Types: deb\n# a remark\nURIs: http://mirror.example/security\nSuites: bookworm-security\n\
         Components: main\n\nTypes: deb deb-src\nURIs: http://mirror.example/debian\n\
         Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /usr/share/keyrings/k.gpg\n";

    #[test]
    fn the_source_of_the_release_is_found_in_either_format() {
        let want = Source {
            uris: "http://mirror.example/debian".to_owned(),
            signed_by: Some("/usr/share/keyrings/k.gpg".to_owned()),
        };
        let stanzas = SourceText::Stanzas(STANZAS.to_owned());
        assert_eq!(Source::of(&[stanzas], "bookworm").as_ref(), Some(&want));
        let line = "# deb x bookworm main\n\
                    deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian bookworm main\n";
        assert_eq!(
            Source::of(&[SourceText::Lines(line.to_owned())], "bookworm").as_ref(),
            Some(&want)
        );
    }

    #[test]
    fn other_releases_and_disabled_sources_are_passed_over() {
        let text = STANZAS.replace("Types: deb deb-src", "Enabled: no\nTypes: deb");
        assert_eq!(Source::of(&[SourceText::Stanzas(text)], "bookworm"), None);
        assert_eq!(
            Source::of(&[SourceText::Stanzas(STANZAS.to_owned())], "trixie"),
            None
        );
    }
}
