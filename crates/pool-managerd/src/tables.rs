//! Snapshots as tables for people.

use bytesize::ByteSize;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use pool_api::dto::CapabilitiesView;
use pool_domain::DeviceSnapshot;
use pool_services::preflight::{Finding, Outcome};
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

/// A preflight report, with what to do below it.
#[must_use]
pub fn findings(findings: &[Finding]) -> String {
    let mut t = table(&["", "WHAT", "FOUND"]);
    for f in findings {
        let mark = match f.outcome {
            Outcome::Fine => "ok",
            Outcome::Weak => "!",
            Outcome::Broken => "NO",
        };
        t.add_row([mark, &f.what, &f.found]);
    }
    let mut out = done(&t);
    for f in findings.iter().filter(|f| !f.remedy.is_empty()) {
        out.push_str(&format!("{}: {}\n", f.what, f.remedy));
    }
    out
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

/// Characters of a bar.
const BAR: u64 = 20;

/// How much of a whole is used, as a person sees it at a glance.
fn bar(used: u64, whole: u64) -> String {
    let full = if whole == 0 { 0 } else { (u128::from(used) * u128::from(BAR)).div_ceil(u128::from(whole)) };
    let full = usize::try_from(full).unwrap_or(usize::MAX).min(BAR as usize);
    format!("[{}{}]", "#".repeat(full), ".".repeat(BAR as usize - full))
}

/// Who uses a device: pools, then processes of others.
fn users(d: &DeviceSnapshot, pools: &[PoolSnapshot]) -> String {
    let on = |r: &ReplicaSnapshot| r.vram_reserved > 0 && r.device_mask.split(',').any(|uuid| uuid == d.uuid);
    let ours = pools.iter().filter(|p| p.replicas.iter().any(on)).map(|p| p.pool_id.to_string());
    let others = d.details.processes.iter().filter(|p| !p.ours).map(|p| {
        let name = p.name.as_deref().unwrap_or("a process");
        format!("{name} ({}, {})", p.pid, size(p.bytes))
    });
    let all: Vec<String> = ours.chain(others).collect();
    if all.is_empty() { "-".into() } else { all.join(", ") }
}

/// The devices: a line each, and what is wrong with whom and what to do.
#[must_use]
pub fn devices(node: &NodeSnapshot, pools: &[PoolSnapshot]) -> String {
    let mut out = String::new();
    if node.simulated {
        out.push_str("These GPUs are SIMULATED: nothing computes on them.\n");
    }
    if let Some(driver) = &node.driver {
        let cuda = node.cuda.as_ref().map_or_else(String::new, |cuda| format!(", CUDA {cuda}"));
        out.push_str(&format!("driver {driver}{cuda}\n"));
    }
    if let Some(problem) = &node.problem {
        out.push_str(&format!("problem: {problem}\n"));
    }
    if node.devices.is_empty() {
        out.push_str("no devices\n");
        return out;
    }
    let mut t = table(&[
        "GPU", "NAME", "VRAM", "USED", "TOTAL", "PROMISED", "UTIL", "TEMP", "POWER", "HEALTH", "USED BY", "UUID",
    ]);
    let shown = |n: Option<u32>, unit: &str| n.map_or_else(|| "-".into(), |n| format!("{n} {unit}"));
    for (d, reserved) in &node.devices {
        t.add_row([
            index(d),
            d.name.clone(),
            bar(d.vram_used.max(*reserved), d.vram_total),
            size(d.vram_used),
            size(d.vram_total),
            size(*reserved),
            shown(d.utilisation, "%"),
            shown(d.details.temperature, "C"),
            shown(d.details.power.map(|p| p / 1_000), "W"),
            d.health.code().to_owned(),
            users(d, pools),
            d.uuid.clone(),
        ]);
    }
    out.push_str(&done(&t));
    for (d, _) in &node.devices {
        let advice = d.verdict.advice();
        if !d.health.admits() || !advice.is_empty() {
            let todo = if advice.is_empty() { String::new() } else { format!(" - {advice}") };
            out.push_str(&format!("GPU {} is {}{todo}\n", index(d), d.health));
        }
    }
    out
}

/// As masks write it.
fn index(d: &DeviceSnapshot) -> String {
    d.mig.as_ref().map_or_else(|| d.index.to_string(), |m| format!("{}:{}", d.index, m.index))
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
        assert_eq!((bar(0, 0), bar(1, 24 << 30)), (format!("[{}]", ".".repeat(20)), format!("[#{}]", ".".repeat(19))));
        assert_eq!(
            (bar(12, 24), bar(99, 24)),
            (format!("[{}{}]", "#".repeat(10), ".".repeat(10)), format!("[{}]", "#".repeat(20)))
        );
        assert_eq!(pools(&[]), "no pools\n");
        let node = NodeSnapshot { simulated: true, ..NodeSnapshot::default() };
        assert!(devices(&node, &[]).contains("SIMULATED"));
    }
}
