//! `cargo xtask codegen`: files that the code itself describes, generated and committed.
//!
//! Each generator is `pool-managerd`'s example `codegen` with a name; what it prints is the file.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::error::{self, Result};
use crate::{metadata, process};

const GENERATORS: &[(&str, &str)] = &[
    ("openapi", "docs/openapi.json"),
    ("config-schema", "docs/config.schema.json"),
    ("config-reference", "docs/config.md"),
    ("metrics", "docs/metrics.md"),
    ("grafana", "deploy/grafana/pool-managerd.json"),
    ("alerts", "deploy/prometheus/pool-managerd.rules.yml"),
    ("transitions", "docs/lifecycle.md"),
];

/// Writes every generated file, or with `check` tells which are stale.
pub(crate) fn run(check: bool) -> Result<()> {
    process::run(&mut process::cargo(["build", "--quiet", "--package", "pool-managerd", "--example", "codegen"]))?;
    let program = metadata::load()?.target_directory.join("debug/examples/codegen");
    let mut findings = Vec::new();
    for (name, path) in GENERATORS {
        let contents = process::output(Command::new(&program).current_dir(process::root()).arg(name))?;
        findings.extend(ensure(&process::root().join(path), &contents, check)?);
    }
    error::verdict("codegen", &findings)
}

/// Makes `path` hold `contents`; with `check` changes nothing and gives the complaint instead.
pub(crate) fn ensure(path: &Path, contents: &str, check: bool) -> Result<Option<String>> {
    if fs::read_to_string(path).is_ok_and(|old| old == contents) {
        return Ok(None);
    }
    let shown = path.strip_prefix(process::root()).unwrap_or(path).display();
    if check {
        return Ok(Some(format!("{shown} is stale: run `cargo xtask codegen` and commit it")));
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(error::io(dir))?;
    }
    fs::write(path, contents).map_err(error::io(path))?;
    println!("wrote {shown}");
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ensure_writes_once_and_check_only_tells() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docs/file.md");
        assert!(ensure(&path, "a", true).unwrap().is_some_and(|text| text.contains("cargo xtask codegen")));
        assert!(!path.exists());
        assert_eq!(ensure(&path, "a", false).unwrap(), None);
        assert_eq!(ensure(&path, "a", true).unwrap(), None);
        assert!(ensure(&path, "b", true).unwrap().is_some());
        assert_eq!(fs::read_to_string(&path).unwrap(), "a");
    }
}
