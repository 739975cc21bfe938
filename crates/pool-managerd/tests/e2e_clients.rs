//! The daemon as programs of others see it: OpenAI's Python client over llama.cpp's real server, and a tester that makes
//! requests of the OpenAPI document.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Daemon, Engines};

fn target(below: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target").join(below).canonicalize();
    dir.unwrap_or_else(|_| panic!("target/{below} is missing: run `cargo xtask engine` and `cargo xtask clients`"))
}

fn python() -> Command {
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", target("clients/python")).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

/// Runs it to its end, and shows what it said when it found something.
fn passes(command: &mut Command) {
    let output = command.output().unwrap();
    let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{told}");
}

#[test]
fn openai_s_python_client_works_on_a_cold_pool_of_the_real_engine() {
    let (bin, models) = (target("engine/bin/llama-server"), target("engine/models"));
    let pool = |id: &str, more: &str| {
        format!(
            "[[pool]]\nid = \"{id}\"\nmodel = \"file:{models}/tiny.gguf\"\nengine = \"llama.cpp\"\ncontext = 1024\n\
             slots = 2\nvram = \"1 GiB\"\nactivation = \"on_demand\"\n{more}\n",
            models = models.display()
        )
    };
    let daemon = Daemon::start(&format!(
        "[models]\nroots = [\"{models}\"]\n[engines.\"llama.cpp\"]\nkind = \"llama.cpp\"\nmode = \"binary\"\npath = \"{bin}\"\n{}{}",
        pool("tiny", "aliases = [\"small\"]"),
        pool("vectors", "workload = \"embed\"\nargs = [\"--pooling\", \"mean\"]"),
        models = models.display(),
        bin = bin.display(),
    ));
    let _engines = Engines::of(&daemon);
    passes(python().arg(script("openai_client.py")).arg(format!("http://{}", daemon.addr())));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_tester_of_apis_finds_no_server_error_and_no_answer_that_is_not_in_the_document() {
    let daemon = Daemon::start(
        r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
args = ["--vram", "1 GiB"]
vram = "2 GiB"
slots = 4
activation = "preload"
"#,
    );
    let _engines = Engines::of(&daemon);
    daemon.until("chat", |p| p["ready"] == true);
    let addr = daemon.addr();
    // It keeps notes where it runs.
    let notes = tempfile::tempdir().unwrap();
    passes(
        python()
            .current_dir(notes.path())
            .args(["-m", "schemathesis.cli", "--config-file"])
            .arg(script("schemathesis.toml"))
            .args(["run", "--no-color"])
            .arg(format!("http://{addr}/openapi.json"))
            .args(["--phases", "examples,coverage,fuzzing", "--max-examples", "6", "--workers", "1"])
            // The same requests in every run; without these two it looks elsewhere each time.
            .args(["--seed", "1", "--generation-deterministic", "--request-timeout", "30"])
            .args(["--checks", "not_a_server_error,status_code_conformance"])
            .args(["--checks", "content_type_conformance,response_schema_conformance"]),
    );
    assert_eq!(daemon.stop(), Some(0));
}
