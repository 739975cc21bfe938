//! Prints what the code says about itself: `codegen NAME`. `cargo xtask codegen` writes it to `docs/`.
#![forbid(unsafe_code)]

mod monitoring;
mod reference;
mod transitions;

use std::io::Write;
use std::process::ExitCode;

use pool_managerd::config::RawConfig;

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let schema = || serde_json::to_value(schemars::schema_for!(RawConfig)).unwrap_or_default();
    let pretty = |value: &serde_json::Value| serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    let text = match name.as_str() {
        "openapi" => pool_api::server::openapi_json().trim_end().to_owned() + "\n",
        "config-schema" => pretty(&schema()),
        "config-reference" => reference::markdown(&schema()),
        "metrics" => reference::metrics(),
        "grafana" => pretty(&monitoring::dashboard()),
        "alerts" => pretty(&monitoring::rules()),
        "transitions" => transitions::markdown(),
        other => {
            let _ = writeln!(
                std::io::stderr(),
                "codegen: `{other}` is none of openapi, config-schema, config-reference, metrics, transitions, grafana, alerts"
            );
            return ExitCode::from(64);
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
