//! `check`: everything that can be found out without starting anything.

use std::collections::BTreeMap;
use std::path::Path;

use pool_services::planning::{Surroundings, report};
use pool_services::ports::EngineProvisioner;
use pool_services::{Activation, ControlError, NodeSnapshot};

use crate::config::{self, Config, Gpu, Overrides};
use crate::exit::{CONFIG, Exit, print};
use crate::{access, compose, tables};

/// Checks a config and this machine, and prints what would happen.
///
/// # Errors
/// Exit 78 when a part of the config cannot work here, 69 when there is no usable GPU.
pub async fn check(file: Option<&Path>) -> Result<(), Exit> {
    let config = config::load(file, &Overrides::default())?;
    print(&told(&config))?;
    access::open(&config)?;
    let gpus = compose::open_gpus(&config, false).await?;
    let inventory = gpus.inventory().borrow().clone();
    let node = NodeSnapshot {
        simulated: inventory.simulated,
        driver: inventory.driver.clone(),
        cuda: inventory.cuda.clone(),
        xids: Vec::new(),
        devices: inventory.devices.iter().map(|d| (d.clone(), 0)).collect(),
        problem: inventory.problem.clone(),
        events_lost: 0,
    };
    print(&tables::devices(&node, &[]))?;
    // The daemon would wait for them, but who asks wants to know.
    if let Some(absent) = compose::check_masks(&config, &inventory.devices)?.into_iter().next() {
        return Err(absent.into());
    }
    let (mut problems, promised) = (Vec::new(), BTreeMap::new());
    let (models, provisioner) = (compose::models(&config), compose::provisioner(&config)?);
    for (i, pool) in config.specs().enumerate() {
        let external = provisioner.external(pool);
        let mut needs = String::new();
        if external.is_none() {
            let from = Surroundings {
                models: &models,
                provisioner: &provisioner,
                ledger: None,
                devices: &inventory.devices,
                promised: &promised,
            };
            match report(pool, from).await {
                Ok(plan) if plan.fits => needs = tables::needs(&plan),
                // What others hold now may be theirs no more when the pool starts.
                Ok(plan) if plan.waiting_helps => needs = format!(", which waits: {}", plan.reason),
                Ok(plan) => problems.push(config.pool_error(i, "vram", plan.reason).hinting(plan.remedies.join("; "))),
                Err(ControlError::Refused { code, detail }) => {
                    let key = match code.as_str() {
                        "SPLIT_INVALID" => "tensor_split",
                        "MASK_INVALID" => "devices",
                        _ => "model",
                    };
                    problems.push(config.pool_error(i, key, detail));
                }
                Err(other) => problems.push(config.pool_error(i, "model", other.to_string())),
            }
        }
        // As the user of its engines; the preflight says the same with fewer words.
        if let Err(unkept) = provisioner.prove(pool).await {
            problems.push(compose::unkept_error(&config, i, &unkept));
        } else if let Err(failure) = provisioner.preflight(pool).await {
            problems.push(config.pool_error(i, "engine", failure.detail));
        }
        let what = match (external, pool.activation) {
            (Some(addr), _) => format!("uses the engine at {addr}"),
            (None, Activation::Preload) => "starts with the daemon".to_owned(),
            (None, Activation::OnDemand) => "starts when somebody asks".to_owned(),
        };
        let blind = if pool.policy.health.canary {
            ""
        } else {
            "; health.canary is off, so an idle engine that hangs is found only by the next request"
        };
        print(&format!(
            "pool {}: {} of {} on {what_devices}, {} engine(s), {what}{needs}{blind}\n",
            pool.id,
            pool.workload.code(),
            pool.model,
            pool.replicas,
            what_devices = pool.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        ))?;
    }
    let Some(last) = problems.pop() else { return print("the config is valid\n") };
    for problem in problems {
        let _ = Exit::from(problem).report();
    }
    Err(Exit { code: CONFIG, ..Exit::from(last) })
}

fn told(config: &Config) -> String {
    let gpu = match &config.gpu {
        Gpu::Nvml { .. } => "the NVIDIA driver".to_owned(),
        Gpu::Simulated { topology } => format!("{} (SIMULATED)", topology.display()),
    };
    format!(
        "config: {}\nprofile: {}\nlisten: {}\nstate: {}\ndevices: {gpu}\nengine ports: {}-{} on {}\n",
        config.file().map_or_else(|| "defaults".into(), |f| f.display().to_string()),
        config.node.profile.code(),
        config.node.listen,
        config.node.state_dir.display(),
        config.node.engine_ports.start(),
        config.node.engine_ports.end(),
        config.node.engine_listen,
    )
}
