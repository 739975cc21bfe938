//! `cargo xtask trace`: every `done` row of docs/traceability.md names a test that exists and is run.
//!
//! Rows are `| id | status | place | test |`; a test is `crate::path::name` or `crates/…/file.rs::name`; several may
//! stand in one cell, apart by commas or spaces.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::error::{self, Result};
use crate::{process, tests_run, tidy};

const TABLE: &str = "docs/traceability.md";
const STATUSES: &[&str] = &["done", "planned", "elsewhere"];

/// A row of the table.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    line: usize,
    id: String,
    status: String,
    tests: Vec<String>,
}

/// A test that nextest lists: its crate and the rest of its path, binary included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    package: String,
    path: Vec<String>,
}

impl Listed {
    /// From the name of a test's binary and the test's own.
    pub(crate) fn new(binary: &str, test: &str) -> Option<Self> {
        let mut path = binary.split("::").chain(test.split("::")).map(str::to_owned);
        Some(Self { package: path.next()?, path: path.collect() })
    }

    /// Whether it goes by this name: the parts between crate and name (modules, test binary) are all there, in that order.
    pub(crate) fn fits(&self, package: &str, middle: &[&str], name: &str) -> bool {
        let Some((last, before)) = self.path.split_last() else { return false };
        let mut before = before.iter();
        self.package == package && last == name && middle.iter().all(|part| before.any(|other| other == part))
    }
}

/// Checks the table.
pub(crate) fn run(list_file: Option<&Path>) -> Result<()> {
    let table = process::root().join(TABLE);
    let rows = rows(&fs::read_to_string(&table).map_err(error::io(&table))?);
    let list = match list_file {
        Some(path) => fs::read_to_string(path).map_err(error::io(path))?,
        None => process::output(tests_run::nextest()?.args(["list", "--workspace", "--message-format", "oneline"]))?,
    };
    let listed = listed(&list);
    let mut findings = Vec::new();
    let mut counts = BTreeMap::<&str, usize>::new();
    for row in &rows {
        *counts.entry(row.status.as_str()).or_default() += 1;
        let at = format!("{TABLE}:{}: {}", row.line, row.id);
        if !STATUSES.contains(&row.status.as_str()) {
            findings.push(format!("{at}: unknown status `{}`", row.status));
        }
        if row.status == "done" {
            if row.tests.is_empty() {
                findings.push(format!("{at}: done without a test"));
            }
            for test in &row.tests {
                findings.extend(missing(process::root(), &listed, test)?.map(|why| format!("{at}: `{test}` {why}")));
            }
        }
    }
    if rows.is_empty() {
        findings.push(format!("{TABLE}: no rows"));
    }
    let counts: Vec<_> = counts.iter().map(|(status, count)| format!("{count} {status}")).collect();
    println!("trace: {} rows: {}; {} tests listed", rows.len(), counts.join(", "), listed.len());
    error::verdict("trace", &findings)
}

fn rows(table: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    for (at, line) in table.lines().enumerate() {
        let Some(inner) = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|')) else { continue };
        // A bar inside a cell is written `\|`.
        let inner = inner.replace("\\|", "\u{1}");
        let cells: Vec<&str> = inner.split('|').map(str::trim).collect();
        let &[id, status, _, tests] = cells.as_slice() else { continue };
        if status == "status" || status.trim_matches([':', '-']).is_empty() {
            continue;
        }
        let tests = tests.split([',', ' ', '`', ';']).filter(|word| word.contains("::")).map(str::to_owned).collect();
        rows.push(Row { line: at + 1, id: id.to_owned(), status: status.to_lowercase(), tests });
    }
    rows
}

/// Reads `crate[::binary] path::name` lines.
fn listed(list: &str) -> Vec<Listed> {
    let read = |line: &str| {
        let (binary, test) = line.trim().split_once(' ')?;
        Listed::new(binary, test)
    };
    list.lines().filter_map(read).collect()
}

/// Why a test that the table names is none; nothing when all is well.
fn missing(root: &Path, listed: &[Listed], test: &str) -> Result<Option<String>> {
    let Some((place, name)) = test.rsplit_once("::") else { return Ok(Some("is not a path".to_owned())) };
    let (package, middle, files) = if place.ends_with(".rs") {
        let mut parts = place.split('/');
        let package = if parts.next() == Some("crates") { parts.next().unwrap_or_default() } else { "xtask" };
        let file = root.join(place);
        if !file.is_file() {
            return Ok(Some(format!("is in {place}, which does not exist")));
        }
        (package.to_owned(), Vec::new(), vec![file])
    } else {
        let mut parts = place.split("::");
        let package = parts.next().unwrap_or_default().replace('_', "-");
        let dir = if package == "xtask" { root.join("xtask") } else { root.join("crates").join(&package) };
        if !dir.is_dir() {
            return Ok(Some(format!("is in {package}, which is no crate")));
        }
        let mut files = tidy::rust_files(&dir.join("src"))?;
        files.extend(tidy::rust_files(&dir.join("tests"))?);
        (package, parts.collect::<Vec<_>>(), files)
    };
    let mut defined = false;
    for file in files {
        defined |= defines(&fs::read_to_string(&file).map_err(error::io(&file))?, name);
    }
    if !defined {
        return Ok(Some(format!("is nowhere: no `fn {name}`")));
    }
    Ok((!listed.iter().any(|one| one.fits(&package, &middle, name)))
        .then(|| "is not among the tests that run".to_owned()))
}

/// Whether a source has a function of that very name.
fn defines(source: &str, name: &str) -> bool {
    source.split("fn ").skip(1).any(|rest| {
        rest.strip_prefix(name)
            .is_some_and(|after| !after.starts_with(|next: char| next.is_alphanumeric() || next == '_'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "# Title\n\n| id | status | place | test |\n|---|---|:--|--|\n\
        | REQ-1 | done | pool-domain | `demo::lease::grants`, `crates/demo/tests/e2e.rs::serves` |\n\
        | REQ-2 | planned | a \\| b | |\n";

    #[test]
    fn rows_are_read() {
        let rows = rows(TABLE);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].tests, ["demo::lease::grants", "crates/demo/tests/e2e.rs::serves"]);
        assert_eq!((rows[1].status.as_str(), rows[1].tests.len(), rows[1].line), ("planned", 0, 6));
    }

    #[test]
    fn a_done_row_needs_a_test_that_exists_and_runs() {
        let root = tempfile::tempdir().unwrap();
        let demo = root.path().join("crates/demo");
        fs::create_dir_all(demo.join("src")).unwrap();
        fs::create_dir_all(demo.join("tests")).unwrap();
        fs::write(demo.join("src/lease.rs"), "fn grants() {}\nfn not_run() {}\n").unwrap();
        fs::write(demo.join("tests/e2e.rs"), "async fn serves() {}\n").unwrap();
        let listed = listed("demo lease::tests::grants\ndemo::e2e serves\nother gone\n");
        let why = |test| missing(root.path(), &listed, test).unwrap();

        assert_eq!(why("demo::lease::grants"), None);
        assert_eq!(why("demo::lease::tests::grants"), None);
        assert_eq!(why("demo::e2e::serves"), None);
        assert_eq!(why("crates/demo/tests/e2e.rs::serves"), None);
        for (test, part) in [
            ("demo::lease::grant", "nowhere"),
            ("demo::lease::not_run", "not among"),
            ("demo::other::grants", "not among"),
            ("nobody::a", "no crate"),
            ("crates/demo/tests/none.rs::serves", "does not exist"),
        ] {
            assert!(why(test).is_some_and(|text| text.contains(part)), "{test}: {:?}", why(test));
        }
    }
}
