//! `plan`: what would be started where, and what would fit instead, without starting anything.

use std::collections::BTreeMap;

use pool_api::dto::{PlanBody, PlanView};
use pool_services::control::PlanRequest;
use pool_services::planning::{Surroundings, report};

use crate::cli::PlanArgs;
use crate::config::{self, Overrides};
use crate::exit::{Exit, REFUSED, USAGE, print};
use crate::{compose, tables};

/// Plans a model on the devices of this machine, as they are used now.
///
/// # Errors
/// Exit 64 when an option cannot be, 78 when the config or the model cannot, 69 without a usable GPU, 1 when the model
/// does not fit.
pub async fn plan(args: PlanArgs) -> Result<(), Exit> {
    let overrides = Overrides { models: vec![args.model], ..Overrides::default() };
    let config = config::load(args.config.config.as_deref(), &overrides)?;
    let Some(pool) = config.specs().last() else { return Err(Exit::new(USAGE, "there is nothing to plan")) };
    let body = PlanBody {
        pool: None,
        model: Some(pool.model.to_string()),
        engine: Some(args.engine.unwrap_or_else(|| pool.engine.to_string())),
        args: Some(args.args.clone()),
        devices: args.devices,
        context: args.context,
        slots: args.slots,
        kv_type: args.kv_type.map(|kv| [kv.clone(), kv]),
        vram: args.vram,
        tensor_split: args.tensor_split.map(Into::into),
        workload: None,
    };
    let spec = match body.request() {
        Ok(PlanRequest::Spec(spec)) => spec,
        Ok(PlanRequest::Pool(_)) => return Err(Exit::new(USAGE, "there is nothing to plan")),
        Err(problem) => return Err(Exit::new(USAGE, problem.detail)),
    };
    let gpus = compose::open_gpus(&config, false).await?;
    let inventory = gpus.inventory().borrow().clone();
    let (models, provisioner) = (compose::models(&config), compose::provisioner(&config)?);
    let promised = BTreeMap::new();
    let from = Surroundings {
        models: &models,
        provisioner: &provisioner,
        ledger: None,
        devices: &inventory.devices,
        promised: &promised,
    };
    let mut report = report(&spec, from).await.map_err(|e| Exit::new(USAGE, e.to_string()))?;
    if !report.args.is_empty() {
        report.args.extend(args.args);
    }
    let fits = report.fits;
    if args.json {
        let view = serde_json::to_string_pretty(&PlanView::from(report)).unwrap_or_default();
        print(&(view + "\n"))?;
    } else {
        print(&tables::plan(&report, inventory.simulated))?;
    }
    if fits { Ok(()) } else { Err(Exit::new(REFUSED, "the model does not fit as asked")) }
}
