//! `doctor`: whether this machine has what engines need.

use std::path::Path;
use std::time::Duration;

use engine_host::preflight::{self as machine, Places};
use engine_host::{EngineDecl, Kind};
use pool_services::preflight::{self, Finding, Outcome};
use serde::Serialize;

use crate::config::{self, Overrides};
use crate::exit::{BUG, Exit, NO_GPU, REFUSED, print};
use crate::{compose, tables};

/// A line of the report, for programs.
#[derive(Debug, Serialize)]
struct FindingView<'a> {
    what: &'a str,
    outcome: &'static str,
    found: &'a str,
    remedy: &'a str,
}

/// Looks at devices, engines and the machine, and prints what was found, and what to do about it.
///
/// # Errors
/// Exit 69 when there is no usable GPU, 1 when something else keeps engines from running, 78 when the config is none.
pub async fn doctor(file: Option<&Path>, json: bool) -> Result<(), Exit> {
    let config = config::load(file, &Overrides::default())?;
    let decls = compose::declarations(&config)?;
    let mut gpus = compose::begin_gpus(&config)?;
    let devices = match gpus.wait(Some(Duration::ZERO)).await {
        Ok(()) => preflight::devices(&gpus.probe.inventory().borrow()),
        Err(exit) => vec![Finding::broken("GPU driver", exit.message, exit.hints.join("; "))],
    };
    let no_gpu = devices.iter().any(|f| f.outcome == Outcome::Broken);
    let places = Places { state_dir: config.node.state_dir.clone(), cache_dir: config.models.cache_dir.clone() };
    // Without pools, what `serve --model` takes.
    let usual = config.specs().next().is_none();
    let needed =
        |decl: &EngineDecl| usual && decl.kind == Kind::LlamaCpp || config.specs().any(|pool| pool.engine == decl.name);
    let others = [machine::engines(&decls, needed).await, machine::machine(&places, &decls)].concat();
    let broken = others.iter().filter(|f| f.outcome == Outcome::Broken).count();
    let all = [devices, others].concat();
    let text = if json {
        let view = |f: &Finding| {
            serde_json::to_value(FindingView {
                what: &f.what,
                outcome: f.outcome.code(),
                found: &f.found,
                remedy: &f.remedy,
            })
        };
        let views = all.iter().map(view).collect::<Result<Vec<_>, _>>();
        let text = views.and_then(|views| serde_json::to_string_pretty(&views));
        text.map_err(|e| Exit::new(BUG, e.to_string()))? + "\n"
    } else {
        tables::findings(&all)
    };
    print(&text)?;
    match (no_gpu, broken) {
        (true, _) => Err(Exit::new(NO_GPU, "no engine can run here before its GPUs are usable")),
        (false, 0) => Ok(()),
        (false, n) => Err(Exit::new(REFUSED, format!("{n} of what engines need is missing"))),
    }
}
