//! Looks whether a reload can come about, beside everything that runs.

use std::sync::Arc;

use pool_domain::rollout::Strategy;
use tokio::sync::oneshot;

use super::reload::Verdict;
use crate::node::Node;
use crate::planning::{self, Surroundings};
use crate::spec::PoolSpec;

/// Looks whether the new one can run here, without touching the old, and in which way it can take its place.
pub(super) fn verify(
    node: &Node,
    spec: Arc<PoolSpec>,
    strategy: Strategy,
    asleep: bool,
    serving: usize,
) -> oneshot::Receiver<Verdict> {
    let (tell, told) = oneshot::channel();
    let node = node.clone();
    tokio::spawn(async move {
        let verdict = async {
            node.ports.provisioner.preflight(&spec).await.map_err(|failure| failure.detail)?;
            let beside = fits(&node, &spec, false).await?;
            match strategy {
                _ if asleep => Ok(Some(Strategy::InPlace)),
                Strategy::Overlap if beside.is_err() => {
                    Err(format!("it does not fit beside the old one: {}", beside.err().unwrap_or_default()))
                }
                Strategy::Overlap => Ok(Some(Strategy::Overlap)),
                Strategy::Auto if beside.is_ok() => Ok(Some(Strategy::Overlap)),
                other => {
                    // With the old one gone.
                    fits(&node, &spec, true).await??;
                    let gentle = if serving > 1 { Strategy::Rolling } else { Strategy::InPlace };
                    Ok(Some(if other == Strategy::Auto { gentle } else { other }))
                }
            }
        };
        // Nobody waits any more if the reload was given up.
        let _ = tell.send(verdict.await);
    });
    told
}

/// Whether the pool fits beside all that runs, or `alone`: without what it holds itself.
async fn fits(node: &Node, spec: &PoolSpec, alone: bool) -> Result<Result<(), String>, String> {
    let (devices, promised) = node.view.devices_without(alone.then_some(&spec.id));
    let from = Surroundings {
        models: &*node.ports.models,
        provisioner: &*node.ports.provisioner,
        ledger: Some(&*node.ports.ledger),
        devices: &devices,
        promised: &promised,
    };
    let report = planning::report(spec, from).await.map_err(|e| e.to_string())?;
    if !report.engine_problem.is_empty() {
        return Err(report.engine_problem);
    }
    Ok(if report.fits { Ok(()) } else { Err(report.reason) })
}
