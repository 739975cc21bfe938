//! `cargo xtask estimates`: our memory estimates beside what the real engine says, in `docs/estimates.md`.
//!
//! For each shape a sparse GGUF file is written, with a true header and no weights, and `llama-fit-params` is asked what
//! it would take. A file is read back through `model_store::profile`, so readers and formulas are compared together.

mod builder;
mod measure;
mod report;
mod shapes;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{self, Result};
use crate::estimates::builder::Shape;
use crate::{gguf, process};

const DOCUMENT: &str = "docs/estimates.md";

/// Writes the document, or with `check` tells that it is stale or that a goal is missed.
pub(crate) fn run(check: bool) -> Result<()> {
    let dir = process::root().join("target/estimates");
    let bare_dir = dir.join("bare");
    fs::create_dir_all(&bare_dir).map_err(error::io(&bare_dir))?;
    let mut rows = Vec::new();
    for shape in shapes::all() {
        let file = write(&dir, &shape)?;
        let shape = shape.without_vocabulary();
        let bare = write(&bare_dir, &shape)?;
        rows.push(measure::shape(&shape, &file, &bare)?);
    }
    let mut findings = measure::misses(&rows);
    let (path, document) = (process::root().join(DOCUMENT), report::document(&rows));
    if fs::read_to_string(&path).is_ok_and(|old| old == document) {
        println!("{DOCUMENT} is as it should be");
    } else if check {
        findings.push(format!("{DOCUMENT} is stale: run `cargo xtask estimates` and commit it"));
    } else {
        fs::write(&path, document).map_err(error::io(&path))?;
        println!("wrote {DOCUMENT}");
    }
    error::verdict("estimates", &findings)
}

/// Writes a shape as a sparse file: the header is there, the weights are holes.
fn write(dir: &Path, shape: &Shape) -> Result<PathBuf> {
    let path = dir.join(format!("{}.gguf", shape.name.to_lowercase()));
    let (header, data) = gguf::header(&shape.metadata(), &shape.tensors);
    let mut file = File::create(&path).map_err(error::io(&path))?;
    file.write_all(&header).map_err(error::io(&path))?;
    file.set_len(header.len() as u64 + data).map_err(error::io(&path))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use pool_domain::estimate::{KvType, LlamaCppSettings, Overheads, estimate_single};

    use super::*;

    /// Whole tables of the document, without the engine: what it once said is compared with readers and formulas of now.
    #[test]
    fn the_engines_committed_answers_still_hold() {
        let dir = tempfile::tempdir().unwrap();
        let document = fs::read_to_string(process::root().join(DOCUMENT)).unwrap();
        for shape in shapes::all() {
            let profile = model_store::profile(&write(dir.path(), &shape).unwrap()).unwrap();
            let tensors: u64 = shape.tensors.iter().map(gguf::Tensor::bytes).sum();
            assert_eq!((profile.weights(), profile.tensor_bytes), (tensors, tensors), "{}", shape.name);
            let made = estimate_single(&profile, &LlamaCppSettings::default(), Overheads::NONE).unwrap();
            assert!(made.compared, "{} belongs among the compared architectures", shape.name);
            let title = format!("### {} (", shape.name);
            let section = document.split(&title).nth(1).unwrap().split("\n### ").next().unwrap();
            let mut cells = 0;
            for row in section.lines().filter(|line| line.contains("k | ")) {
                let columns: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
                let context: u64 = columns[0].trim_end_matches('k').parse::<u64>().unwrap() * 1024;
                let slots = columns[1].parse().unwrap();
                let engine = |column: usize| columns[column].split(" / ").next().unwrap().parse::<u64>().ok();
                let cases = measure::TYPES.iter().map(|kv| (*kv, true)).chain([(KvType::F16, false)]);
                for (i, (kv, flash)) in cases.enumerate() {
                    let ours = measure::estimate(&profile, context, kv, slots, flash).unwrap();
                    let name = format!("{} {row} {kv} {flash} {ours:?}", shape.name);
                    // Context by type; compute for all types together, then without flash attention.
                    if let (true, Some(theirs)) = (flash, engine(2 + i)) {
                        assert!(measure::near(theirs, ours.context, 1, 1), "{name}");
                        cells += 1;
                    }
                    if let Some(theirs) = engine(if flash { 5 } else { 6 }) {
                        assert!(measure::near(theirs, ours.compute, 100, 3), "{name}");
                        cells += 1;
                    }
                }
            }
            assert_eq!(cells, 40, "{}", shape.name);
        }
    }

    #[test]
    fn goals_are_what_they_say() {
        assert!(measure::near(100, 101, 1, 1) && !measure::near(100, 102, 1, 1));
        assert!(measure::near(1000, 1100, 100, 3) && !measure::near(1000, 1101, 100, 3));
        assert!(measure::near(10_000, 9700, 100, 3) && !measure::near(10_000, 9699, 100, 3));
    }
}
