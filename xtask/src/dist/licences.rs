//! Which crates are in the program, under which licences, with their texts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::error::{self, Result};
use crate::{metadata, process};

/// Names that licence files begin with, in lower case.
const BEGINNINGS: &[&str] = &["licen", "copying", "copyright", "notice", "unlicense"];

/// The report, as text.
pub(super) fn report() -> Result<String> {
    let used = metadata::load()?.closure("pool-managerd");
    let json = process::output(&mut process::cargo(["metadata", "--quiet", "--format-version", "1", "--locked"]))?;
    let json: Value = serde_json::from_str(&json)?;
    let mut rows = BTreeSet::new();
    // Text → crates that have it: a hundred crates share two texts.
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in json["packages"].as_array().into_iter().flatten() {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        // What has no source is ours.
        if !used.contains(text("name")) || package["source"].is_null() {
            continue;
        }
        let crate_name = format!("{} {}", text("name"), text("version"));
        let dir = Path::new(text("manifest_path")).parent().unwrap_or(Path::new("/"));
        let found = texts_in(dir)?;
        rows.insert(format!(
            "{crate_name}: {}{}",
            text("license"),
            if found.is_empty() { " (no text in it)" } else { "" }
        ));
        for licence in found {
            texts.entry(licence).or_default().insert(crate_name.clone());
        }
    }
    Ok(write(&rows, &texts))
}

fn write(rows: &BTreeSet<String>, texts: &BTreeMap<String, BTreeSet<String>>) -> String {
    let mut out = String::from("pool-managerd is MIT OR Apache-2.0. It contains these crates of others:\n\n");
    rows.iter().for_each(|row| out += &format!("{row}\n"));
    out += "\nTheir licence texts:\n";
    // In the order of the crates, so that a text that changes moves nothing else.
    let mut ordered: Vec<_> = texts.iter().collect();
    ordered.sort_by_key(|(_, crates)| crates.first());
    for (text, crates) in ordered {
        let crates: Vec<_> = crates.iter().map(String::as_str).collect();
        out += &format!("\n{}\n{}\n\n{text}\n", "=".repeat(80), crates.join(", "));
    }
    out
}

fn texts_in(dir: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(error::io(dir))? {
        let path = entry.map_err(error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if path.is_file() && BEGINNINGS.iter().any(|beginning| name.starts_with(beginning)) {
            let text = fs::read(&path).map_err(error::io(&path))?;
            found.insert(String::from_utf8_lossy(&text).trim().replace("\r\n", "\n"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_text_is_told_once_with_all_who_have_it() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("LICENSE-MIT", "be kind\r\n"), ("license.md", "be kind"), ("README.md", "no")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let found = texts_in(dir.path()).unwrap();
        assert_eq!(found, BTreeSet::from(["be kind".to_owned()]));
        let crates = BTreeSet::from(["a 1".to_owned(), "b 2".to_owned()]);
        let out = write(&BTreeSet::from(["a 1: MIT".to_owned()]), &BTreeMap::from([("be kind".to_owned(), crates)]));
        assert_eq!(out.matches("be kind").count(), 1);
        assert!(out.contains("a 1, b 2") && out.contains("a 1: MIT"), "{out}");
    }
}
