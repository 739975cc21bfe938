//! `cargo xtask tidy`: the layering of the design and the house rules.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{self, Result};
use crate::metadata::{self, Metadata};
use crate::process;

const MAX_LINES: usize = 700;

/// Crates whose `lib.rs` may use unsafe code: system calls between fork and exec; a C library's calls that have no safe form,
/// and its face.
const UNSAFE_ALLOWED: &[&str] = &["engine-shim", "gpu-nvml", "nvml-standin"];

/// Which of our crates another of ours may use, however far down.
#[derive(Debug, Clone, Copy)]
enum Ours {
    /// None but these.
    Only(&'static [&'static str]),
    /// All but these.
    Not(&'static [&'static str]),
}

/// What a crate must not know: a row of the design's table of layers. `gpu-*` stands for every crate of that beginning.
#[derive(Debug)]
struct Rule {
    crates: &'static [&'static str],
    ours: Ours,
    /// Not used, however far down: only where everything between is meant to be free of it too.
    never: &'static [&'static str],
    /// Not named in the crate's own manifest; a library below may use it for its own purposes.
    not_named: &'static [&'static str],
}

/// Known to all whose work has side effects, since without tests it is nothing.
const FREE: &str = "fault-points";

const RULES: &[Rule] = &[
    Rule {
        crates: &["pool-domain"],
        ours: Ours::Only(&[]),
        never: &["tokio", "hyper", "axum", "toml", "rustix", "nvml-wrapper", FREE],
        not_named: &["serde_json", "libc", "fastrand", "getrandom"],
    },
    Rule {
        crates: &["pool-services"],
        ours: Ours::Only(&["pool-domain"]),
        never: &["hyper", "axum", "toml", "nvml-wrapper"],
        not_named: &["rustix", "libc", "http"],
    },
    Rule {
        crates: &["pool-api"],
        ours: Ours::Only(&["pool-domain", "pool-services"]),
        never: &["nvml-wrapper", "toml"],
        // tokio and tempfile-like libraries may use rustix below.
        not_named: &["rustix", "libc"],
    },
    Rule {
        crates: &["gpu-*"],
        ours: Ours::Not(&["engine-*", "pool-api", "pool-managerd", "model-store", "state-dir", "stub-engine"]),
        never: &["hyper", "axum"],
        not_named: &[],
    },
    Rule {
        crates: &["engine-host"],
        ours: Ours::Not(&["pool-api", "pool-managerd", "gpu-*", "model-store", "state-dir"]),
        never: &["axum", "nvml-wrapper"],
        not_named: &[],
    },
    Rule { crates: &["engine-shim"], ours: Ours::Only(&[]), never: &["tokio", "hyper", "axum", FREE], not_named: &[] },
    Rule {
        crates: &["model-store", "state-dir"],
        ours: Ours::Not(&["engine-*", "gpu-*", "pool-api", "pool-managerd", "stub-engine"]),
        never: &["axum", "nvml-wrapper"],
        not_named: &[],
    },
    Rule { crates: &["stub-engine"], ours: Ours::Only(&["sim-claims"]), never: &["nvml-wrapper"], not_named: &[] },
    Rule { crates: &["durable-files"], ours: Ours::Only(&[]), never: &["tokio", "serde"], not_named: &[] },
    Rule { crates: &["sim-claims", FREE], ours: Ours::Only(&[]), never: &["tokio"], not_named: &[] },
];

/// For tests only: no crate uses these outside its dev-dependencies.
const DEV_ONLY: &[&str] = &["pool-testkit", "nvml-standin", "xtask"];

/// Runs all checks.
pub(crate) fn run() -> Result<()> {
    let metadata = metadata::load()?;
    let mut findings = layers(&metadata);
    for member in &metadata.members {
        let manifest = read(&member.dir.join("Cargo.toml"))?;
        if !inherits_lints(&manifest) {
            findings.push(format!("{}: Cargo.toml lacks `[lints] workspace = true`", member.name));
        }
        let lib = member.dir.join("src/lib.rs");
        let may_be_unsafe = UNSAFE_ALLOWED.contains(&member.name.as_str());
        if lib.is_file() && !may_be_unsafe && !read(&lib)?.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]")
        {
            findings.push(format!("{}: src/lib.rs lacks `#![forbid(unsafe_code)]`", member.name));
        }
        for dir in ["src", "tests", "examples", "benches"] {
            for file in rust_files(&member.dir.join(dir))? {
                let shown = file.strip_prefix(process::root()).unwrap_or(&file).display().to_string();
                findings.extend(source(&shown, &read(&file)?, dir == "src"));
            }
        }
    }
    error::verdict("tidy", &findings)?;
    println!("tidy: {} crates, nothing found", metadata.members.len());
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(error::io(path))
}

/// Whether a name fits a pattern, which may end in `*`.
fn fits(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

fn any_fits(patterns: &[&str], name: &str) -> bool {
    patterns.iter().any(|pattern| fits(pattern, name))
}

fn layers(metadata: &Metadata) -> Vec<String> {
    let mut findings = Vec::new();
    for member in &metadata.members {
        let below = metadata.closure(&member.name);
        let ours =
            || metadata.members.iter().map(|other| &other.name).filter(|name| *name != FREE && below.contains(*name));
        let mut wrong = |what: &str, how: &str| findings.push(format!("{} {how} {what}", member.name));
        ours().filter(|name| any_fits(DEV_ONLY, name)).for_each(|name| wrong(name, "uses, outside tests,"));
        for rule in RULES.iter().filter(|rule| any_fits(rule.crates, &member.name)) {
            let allowed = |name: &str| match rule.ours {
                Ours::Only(names) => any_fits(names, name),
                Ours::Not(names) => !any_fits(names, name),
            };
            ours().filter(|name| !allowed(name)).for_each(|name| wrong(name, "must not know"));
            below.iter().filter(|name| any_fits(rule.never, name)).for_each(|name| wrong(name, "must not use"));
            member
                .declared
                .iter()
                .filter(|name| any_fits(rule.not_named, name) || any_fits(rule.never, name) && !below.contains(*name))
                .for_each(|name| wrong(name, "must not name as a dependency"));
        }
    }
    findings
}

fn inherits_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    lines.find(|line| !line.is_empty() && !line.starts_with('#')) == Some("workspace = true")
}

fn source(path: &str, text: &str, limited: bool) -> Vec<String> {
    // Put together here so that this file does not find itself.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!("), concat!("unimpl", "emented!(")];
    let mut findings = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if let Some(mark) = marks.iter().find(|mark| line.contains(**mark)) {
            findings.push(format!("{path}:{}: {mark}", at + 1));
        }
    }
    let lines = text.lines().count();
    if limited && lines > MAX_LINES {
        findings.push(format!("{path}: {lines} lines, more than {MAX_LINES}"));
    }
    findings
}

/// All `.rs` files below a folder, in order; none when there is no such folder.
pub(crate) fn rust_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !dir.is_dir() {
        return Ok(files);
    }
    for entry in fs::read_dir(dir).map_err(error::io(dir))? {
        let path = entry.map_err(error::io(dir))?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::metadata::Member;

    fn graph(edges: &[(&str, &[&str])], members: &[&str]) -> Metadata {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let mut metadata = Metadata::default();
        metadata.normal.extend(edges.iter().map(|(from, to)| ((*from).to_owned(), set(to))));
        metadata.members.extend(members.iter().map(|name| Member {
            name: (*name).to_owned(),
            dir: PathBuf::new(),
            declared: metadata.normal.get(*name).cloned().unwrap_or_default(),
        }));
        metadata
    }

    #[test]
    fn a_forbidden_library_is_found_however_deep() {
        let found = layers(&graph(&[("pool-domain", &["helper"]), ("helper", &["tokio"])], &["pool-domain"]));
        assert_eq!(found, ["pool-domain must not use tokio"]);
    }

    #[test]
    fn one_of_ours_is_found_by_pattern() {
        let edges: &[(&str, &[&str])] = &[("model-store", &["gpu-sim"]), ("gpu-sim", &["pool-domain"])];
        let found = layers(&graph(edges, &["model-store", "gpu-sim", "pool-domain"]));
        assert_eq!(found, ["model-store must not know gpu-sim"]);
    }

    #[test]
    fn a_library_below_may_use_what_must_not_be_named() {
        let below = graph(&[("pool-services", &["tokio"]), ("tokio", &["libc"])], &["pool-services"]);
        assert_eq!(layers(&below), Vec::<String>::new());
        let named = graph(&[("pool-services", &["libc"])], &["pool-services"]);
        assert_eq!(layers(&named), ["pool-services must not name as a dependency libc"]);
    }

    #[test]
    fn test_crates_stay_in_tests() {
        let found = layers(&graph(&[("pool-managerd", &["pool-testkit"])], &["pool-managerd", "pool-testkit"]));
        assert_eq!(found, ["pool-managerd uses, outside tests, pool-testkit"]);
    }

    #[test]
    fn lints_must_be_inherited() {
        assert!(inherits_lints("[package]\nname = \"a\"\n\n[lints]\n# all\nworkspace = true\n"));
        assert!(!inherits_lints("[package]\nname = \"a\"\n"));
        assert!(!inherits_lints("[lints]\n[dependencies]\nworkspace = true\n"));
    }

    #[test]
    fn marks_and_long_files_are_found() {
        let mark = concat!("// TO", "DO later");
        assert_eq!(source("a.rs", &format!("fn a() {{}}\n{mark}\n"), true), [concat!("a.rs:2: TO", "DO")]);
        assert_eq!(source("a.rs", &"\n".repeat(701), true).len(), 1);
        assert_eq!(source("a.rs", &"\n".repeat(701), false).len(), 0);
    }
}
