//! Snapshots as tables for people.

use bytesize::ByteSize;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use pool_api::dto::CapabilitiesView;
use pool_services::{NodeSnapshot, Operation, OperationState, PlanReport, PoolSnapshot, ReplicaSnapshot};

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header.to_vec());
    table
}

fn done(table: &Table) -> String {
    table.lines().map(|l| format!("{}\n", l.trim())).collect()
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

/// Every pool, a line each.
#[must_use]
pub fn pools(pools: &[PoolSnapshot]) -> String {
    if pools.is_empty() {
        return "no pools\n".into();
    }
    let mut t = table(&["POOL", "STATE", "READY", "SLOTS", "LEASES", "RESTARTS", "BREAKER", "MODEL", "REASON"]);
    for p in pools {
        let ready = p.ready_replicas();
        let of = |f: fn(&ReplicaSnapshot) -> u32| p.replicas.iter().map(f).sum::<u32>();
        let lead = p.lead();
        t.add_row([
            p.pool_id.to_string(),
            format!("{}{}", lead.map_or("", |l| l.state), if p.hold { " (held)" } else { "" }),
            format!("{ready}/{}", p.replicas.len()),
            of(|r| r.slots_total).to_string(),
            of(|r| r.active_leases).to_string(),
            p.replicas.iter().map(|r| r.restart_count).sum::<u64>().to_string(),
            lead.map_or("", |l| l.breaker).to_owned(),
            p.model_id.clone(),
            lead.map_or_else(String::new, |l| l.reason.clone()),
        ]);
    }
    done(&t)
}

/// What a node can do.
#[must_use]
pub fn capabilities(c: &CapabilitiesView) -> String {
    let mut engines = table(&["ENGINE", "KIND", "MODE", "VERSIONS HERE"]);
    for e in &c.engines {
        engines.add_row([e.name.clone(), e.kind.clone(), e.mode.clone(), e.versions.join(", ")]);
    }
    let mut pools = table(&["POOL", "WORKLOAD", "MODEL", "QUANTIZATION", "CONTEXT", "SLOTS", "NAMES"]);
    for p in &c.pools {
        pools.add_row([
            p.pool_id.clone(),
            p.workload.clone(),
            p.model_id.clone(),
            p.quantization.clone().unwrap_or_default(),
            p.context.map(|c| c.to_string()).unwrap_or_default(),
            p.slots_total.to_string(),
            p.aliases.join(", "),
        ]);
    }
    let pools = if c.pools.is_empty() { "no pools\n".to_owned() } else { done(&pools) };
    format!("{}\n{pools}", done(&engines))
}

/// A plan: what each device would hold, and what would change that.
#[must_use]
pub fn plan(p: &PlanReport, simulated: bool) -> String {
    let mut out = String::new();
    if simulated {
        out.push_str("these GPUs are SIMULATED\n");
    }
    if p.fits {
        let header =
            ["GPU", "LAYERS", "WEIGHTS", "KV", "COMPUTE", "RUNTIME", "MARGIN", "PROMISED", "FREE NOW", "FREE AFTER"];
        let mut t = table(&header);
        for r in &p.rows {
            let layers = match (r.layers.is_empty(), r.output) {
                (true, false) => "-".to_owned(),
                (true, true) => "output".to_owned(),
                (false, output) => {
                    format!("{}-{}{}", r.layers.start, r.layers.end - 1, if output { "+output" } else { "" })
                }
            };
            let e = &r.estimate;
            let sizes = [e.weights, e.kv, e.compute, e.runtime, e.margin, r.promised, r.room, r.free_after()];
            t.add_row([r.index.to_string(), layers].into_iter().chain(sizes.map(size)));
        }
        out.push_str(&done(&t));
        let host = p.host.expected();
        out.push_str(&format!("host memory: {}\n", size(host)));
        if let Some(context) = p.context {
            out.push_str(&format!("context: {context} tokens over all slots\n"));
        }
        if p.learnt {
            out.push_str("promised is what such an engine took before, and a margin\n");
        }
        if let Some(split) = &p.tensor_split {
            out.push_str(&format!("tensor split: {split}\n"));
        }
        if p.engine_problem.is_empty() {
            out.push_str(&format!("arguments: {}\n", p.args.join(" ")));
        } else {
            out.push_str(&format!("the engine cannot be run here: {}\n", p.engine_problem));
        }
    } else {
        let wait = if p.waiting_helps { "it does not fit now" } else { "it never fits" };
        out.push_str(&format!("{wait}: {}\n", p.reason));
    }
    for remedy in &p.remedies {
        out.push_str(&format!("{}: {remedy}\n", if p.fits { "also" } else { "instead" }));
    }
    out
}

/// What a plan takes, as the end of a sentence.
#[must_use]
pub fn needs(p: &PlanReport) -> String {
    let rows: Vec<_> = p.rows.iter().filter(|r| r.promised > 0).collect();
    if rows.is_empty() {
        return String::new();
    }
    let each: Vec<String> = rows.iter().map(|r| format!("{} on GPU {}", size(r.promised), r.index)).collect();
    format!(", needs {}", each.join(" and "))
}

/// One pool in full.
#[must_use]
pub fn pool(p: &PoolSnapshot) -> String {
    let mut out = pools(std::slice::from_ref(p));
    let mut t = table(&["REPLICA", "GEN", "STATE", "READY", "PID", "ENDPOINT", "DEVICES", "PROOF", "NEXT START"]);
    for r in &p.replicas {
        t.add_row([
            r.id.to_string(),
            r.generation.0.to_string(),
            r.state.to_owned(),
            if r.ready { "yes" } else { "no" }.to_owned(),
            r.pid.map_or_else(|| "-".into(), |p| p.to_string()),
            r.endpoint.clone().unwrap_or_else(|| "-".into()),
            r.device_mask.clone(),
            if r.proof.is_empty() { "-" } else { r.proof }.to_owned(),
            r.next_start_in_ms.map_or_else(|| "-".into(), |ms| format!("in {:.1} s", ms as f64 / 1000.0)),
        ]);
    }
    out.push('\n');
    out.push_str(&done(&t));
    if let Some(e) = p.last_error() {
        let at = humantime::format_rfc3339_seconds(e.at.max(std::time::UNIX_EPOCH));
        out.push_str(&format!("\nlast error: {} at {at}: {}\n", e.class.code(), e.detail));
    }
    out
}

/// The devices.
#[must_use]
pub fn devices(node: &NodeSnapshot) -> String {
    let mut out = String::new();
    if node.simulated {
        out.push_str("These GPUs are SIMULATED: nothing computes on them.\n");
    }
    if let Some(problem) = &node.problem {
        out.push_str(&format!("problem: {problem}\n"));
    }
    if node.devices.is_empty() {
        out.push_str("no devices\n");
        return out;
    }
    let mut t = table(&["INDEX", "UUID", "NAME", "TOTAL", "USED", "FREE", "RESERVED", "CC", "HEALTH"]);
    for (d, reserved) in &node.devices {
        t.add_row([
            d.mig.as_ref().map_or_else(|| d.index.to_string(), |m| format!("{}:{}", d.index, m.index)),
            d.uuid.clone(),
            d.name.clone(),
            size(d.vram_total),
            size(d.vram_used),
            size(d.vram_free),
            size(*reserved),
            d.compute_capability.map_or_else(|| "-".into(), |(a, b)| format!("{a}.{b}")),
            d.health.to_string(),
        ]);
    }
    out.push_str(&done(&t));
    out
}

/// An operation in one line.
#[must_use]
pub fn operation(o: &Operation) -> String {
    match &o.state {
        OperationState::Running => format!("{} of {} is running ({}): {}\n", o.verb, o.pool_id, o.id, o.progress),
        OperationState::Succeeded(outcome) => format!("{} of {}: {outcome}\n", o.verb, o.pool_id),
        OperationState::Failed(reason) => format!("{} of {} failed: {reason}\n", o.verb, o.pool_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_plainly() {
        assert_eq!(pools(&[]), "no pools\n");
        let node = NodeSnapshot { simulated: true, ..NodeSnapshot::default() };
        assert!(devices(&node).contains("SIMULATED"));
    }
}
