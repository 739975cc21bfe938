//! `cargo xtask faults`: docs/faults.md, which faults there are, what becomes of each, and which test of the last run
//! says so. Needs a run of all tests (`cargo xtask test`), of which nextest leaves a report.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use crate::codegen::ensure;
use crate::error::{self, Result};
use crate::trace::Listed;
use crate::{metadata, process};

mod rows;

use rows::{By, ROWS};

const DOCUMENT: &str = "docs/faults.md";

/// Where nextest leaves its report (.config/nextest.toml).
pub(crate) fn report() -> Result<PathBuf> {
    Ok(metadata::load()?.target_directory.join("nextest/default/junit.xml"))
}

/// Writes the document, or with `check` fails when it is stale. Fails in both cases when a test of a row did not run or
/// did not pass.
pub(crate) fn run(check: bool) -> Result<()> {
    let path = report()?;
    let results = results(&fs::read_to_string(&path).map_err(error::io(&path))?);
    let mut findings = Vec::new();
    let document = document(&results, &mut findings);
    // What did not hold is not written down as if it had.
    error::verdict("faults", &findings)?;
    findings.extend(
        ensure(&process::root().join(DOCUMENT), &document, check)?
            .map(|_| format!("{DOCUMENT} is stale: run `cargo xtask faults` and commit it")),
    );
    let skipped = results.iter().filter(|(_, outcome)| *outcome == Outcome::Skipped).count();
    println!(
        "faults: {} rows, {} tests in the report, {skipped} of them skipped themselves",
        ROWS.len(),
        results.len()
    );
    error::verdict("faults", &findings)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    /// It passed by saying that it cannot be done here.
    Skipped,
    Failed,
}

/// Reads the report: tests and what came of them.
fn results(junit: &str) -> Vec<(Listed, Outcome)> {
    let case = |text: &str| {
        let (head, rest) = text.split_once('>')?;
        // `<testcase …/>` has no body; one with output, or a failure, has.
        let body = if head.ends_with('/') { "" } else { rest.split("</testcase>").next().unwrap_or(rest) };
        let attribute = |name: &str| {
            let value = head.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix("=\""))?;
            Some(value.split('"').next()?.to_owned())
        };
        let outcome = if body.contains("<failure") || body.contains("<error") {
            Outcome::Failed
        } else if body.contains("skipped: ") {
            Outcome::Skipped
        } else {
            Outcome::Passed
        };
        Some((Listed::new(&attribute("classname")?, &attribute("name")?)?, outcome))
    };
    junit.split("<testcase ").skip(1).filter_map(case).collect()
}

/// What came of a test that a row names as docs/traceability.md does.
fn outcome(results: &[(Listed, Outcome)], test: &str) -> Option<Outcome> {
    let mut parts: Vec<&str> = test.split("::").collect();
    let (name, package) = (parts.pop()?, parts.remove(0));
    results.iter().find(|(listed, _)| listed.fits(package, &parts, name)).map(|(_, outcome)| *outcome)
}

fn document(results: &[(Listed, Outcome)], findings: &mut Vec<String>) -> String {
    let mut text = "# Faults\n\nWhat goes wrong, what becomes of it, and the test that says so. Written by \
        `cargo xtask faults` from the rows in\n`xtask/src/faults/rows.rs` and from the report of the last run of the \
        tests: a row whose test did not run and pass fails it.\nFaults of GPUs are played by the driver \
        library's stand-in; none of this has run on a real one.\n\n| fault | outcome | held by |\n|---|---|---|\n"
        .to_owned();
    for row in ROWS {
        let held = match row.by {
            By::Tests(tests) => {
                let mut names = Vec::new();
                for test in tests {
                    match outcome(results, test) {
                        Some(Outcome::Passed | Outcome::Skipped) => names.push(format!("`{test}`: passed")),
                        Some(Outcome::Failed) => findings.push(format!("{}: `{test}` failed", row.fault)),
                        None => findings.push(format!("{}: `{test}` is not in the report", row.fault)),
                    }
                }
                names.join("<br>")
            }
            By::Later(why) => why.to_owned(),
        };
        let _infallible = writeln!(text, "| {} | {} | {held} |", row.fault, row.outcome);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"<testsuite name="pool-managerd::chaos" tests="3">
        <testcase name="daemons::a" classname="pool-managerd::chaos" timestamp="x" time="1.0">
        </testcase>
        <testcase name="b" classname="xtask" time="1"><failure type="test failure">boom</failure></testcase>
        <testcase name="c" classname="xtask" time="1"><system-err>skipped: no root</system-err></testcase>
        <testcase name="d" classname="xtask" time="1"/>
    </testsuite>"#;

    #[test]
    fn the_report_is_read() {
        let results = results(REPORT);
        let of = |name: &str| outcome(&results, name);
        assert_eq!(of("pool-managerd::chaos::a"), Some(Outcome::Passed));
        assert_eq!((of("xtask::b"), of("xtask::c")), (Some(Outcome::Failed), Some(Outcome::Skipped)));
        assert_eq!((of("xtask::d"), of("xtask::e")), (Some(Outcome::Passed), None));
    }

    #[test]
    fn a_test_that_did_not_run_is_told() {
        let mut findings = Vec::new();
        document(&[], &mut findings);
        assert!(findings.iter().any(|f| f.contains("is not in the report")));
    }
}
