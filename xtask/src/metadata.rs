//! What `cargo metadata` says, cut down to the dependency graph.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::process;

/// The workspace as cargo resolves it for this platform.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    /// Cargo's target directory.
    pub(crate) target_directory: PathBuf,
    /// Our crates.
    pub(crate) members: Vec<Member>,
    /// Package name → names of the packages its library and binaries use (no dev, no build dependencies).
    pub(crate) normal: BTreeMap<String, BTreeSet<String>>,
}

/// One of our crates.
#[derive(Debug)]
pub(crate) struct Member {
    /// Its name.
    pub(crate) name: String,
    /// Its folder.
    pub(crate) dir: PathBuf,
    /// What its own manifest names as normal dependencies, optional ones included.
    pub(crate) declared: BTreeSet<String>,
}

impl Metadata {
    /// All that a package uses, however far down.
    pub(crate) fn closure(&self, name: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut next = vec![name.to_owned()];
        while let Some(name) = next.pop() {
            for dependency in self.normal.get(&name).into_iter().flatten() {
                if seen.insert(dependency.clone()) {
                    next.push(dependency.clone());
                }
            }
        }
        seen
    }
}

/// Asks cargo.
pub(crate) fn load() -> Result<Metadata> {
    let rustc = process::output(std::process::Command::new("rustc").arg("-vV"))?;
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or("x86_64-unknown-linux-gnu");
    let args = ["metadata", "--quiet", "--format-version", "1", "--filter-platform", host];
    parse(&serde_json::from_str(&process::output(&mut process::cargo(args))?)?)
}

fn parse(json: &Value) -> Result<Metadata> {
    let mut metadata = Metadata { target_directory: text(&json["target_directory"])?.into(), ..Metadata::default() };
    let members = list(&json["workspace_members"])?;
    let mut names = BTreeMap::new();
    for package in list(&json["packages"])? {
        let (id, name) = (text(&package["id"])?, text(&package["name"])?);
        names.insert(id, name);
        if members.contains(&package["id"]) {
            let mut dir = PathBuf::from(text(&package["manifest_path"])?);
            dir.pop();
            let mut declared = BTreeSet::new();
            for dependency in list(&package["dependencies"])? {
                if dependency["kind"].is_null() {
                    declared.insert(text(&dependency["name"])?.to_owned());
                }
            }
            metadata.members.push(Member { name: name.to_owned(), dir, declared });
        }
    }
    for node in list(&json["resolve"]["nodes"])? {
        let used = metadata.normal.entry(name_of(&names, &node["id"])?).or_default();
        for dependency in list(&node["deps"])? {
            if list(&dependency["dep_kinds"])?.iter().any(|kind| kind["kind"].is_null()) {
                used.insert(name_of(&names, &dependency["pkg"])?);
            }
        }
    }
    Ok(metadata)
}

fn name_of(names: &BTreeMap<&str, &str>, id: &Value) -> Result<String> {
    let id = text(id)?;
    names.get(id).map(|name| (*name).to_owned()).ok_or_else(|| Error::Check(format!("cargo metadata: unknown {id}")))
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().ok_or_else(|| Error::Check(format!("cargo metadata: text expected, got {value}")))
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().ok_or_else(|| Error::Check(format!("cargo metadata: list expected, got {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_normal_dependencies_count() {
        let json = serde_json::json!({
            "target_directory": "/t",
            "workspace_members": ["a 1"],
            "packages": [
                { "id": "a 1", "name": "a", "manifest_path": "/w/a/Cargo.toml",
                  "dependencies": [{ "name": "b", "kind": null }, { "name": "c", "kind": "dev" }] },
                { "id": "b 1", "name": "b", "manifest_path": "/r/b/Cargo.toml", "dependencies": [] },
                { "id": "c 1", "name": "c", "manifest_path": "/r/c/Cargo.toml", "dependencies": [] },
            ],
            "resolve": { "nodes": [
                { "id": "a 1", "deps": [
                    { "pkg": "b 1", "dep_kinds": [{ "kind": null }] },
                    { "pkg": "c 1", "dep_kinds": [{ "kind": "dev" }] },
                ] },
                { "id": "b 1", "deps": [] },
                { "id": "c 1", "deps": [] },
            ] },
        });
        let metadata = parse(&json).unwrap();
        assert_eq!(metadata.closure("a"), BTreeSet::from(["b".to_owned()]));
        assert_eq!(metadata.members[0].declared, BTreeSet::from(["b".to_owned()]));
        assert_eq!(metadata.members[0].dir, PathBuf::from("/w/a"));
    }
}
