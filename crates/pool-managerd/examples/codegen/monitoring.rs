//! A Grafana dashboard and alert rules for Prometheus, over the metrics as the code names them.

use pool_api::metrics::MetricDoc;
use pool_api::metrics::names as m;
use serde_json::{Value, json};

/// Width of a dashboard in Grafana's own units.
const WIDTH: u32 = 24;

struct Panel {
    title: &'static str,
    kind: &'static str,
    unit: &'static str,
    width: u32,
    /// Each with its legend.
    queries: Vec<(String, &'static str)>,
}

fn panel(title: &'static str, unit: &'static str, queries: Vec<(String, &'static str)>) -> Panel {
    Panel { title, kind: "timeseries", unit, width: 12, queries }
}

/// A metric of the instances and pools that are chosen above the panels.
fn of(metric: MetricDoc, more: &str) -> String {
    let pool = if metric.labels.contains(&"pool_id") { ", pool_id=~\"$pool\"" } else { "" };
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    format!("{}{{instance=~\"$instance\"{pool}{more}}}", metric.name)
}

/// Per second.
fn rate(metric: MetricDoc, more: &str) -> String {
    format!("rate({}[$__rate_interval])", of(metric, more))
}

/// So much of what a histogram has seen took no longer.
fn quantile(share: f64, metric: MetricDoc) -> String {
    let buckets = of(metric, "").replacen(metric.name, &format!("{}_bucket", metric.name), 1);
    format!("histogram_quantile({share}, sum by (le, pool_id) (rate({buckets}[$__rate_interval])))")
}

fn panels() -> Vec<Panel> {
    let sum = |by: &str, of: String| format!("sum by ({by}) ({of})");
    vec![
        Panel {
            kind: "stat",
            width: 6,
            ..panel(
                "Pools ready",
                "short",
                vec![
                    (format!("sum({})", of(m::POOL_READY, "")), "ready"),
                    (format!("count({})", of(m::POOL_READY, "")), "declared"),
                ],
            )
        },
        Panel {
            kind: "stat",
            width: 6,
            ..panel(
                "Leases held",
                "short",
                vec![
                    (format!("sum({})", of(m::LEASES_ACTIVE, "")), "held"),
                    (format!("sum({})", of(m::SLOTS, "")), "slots"),
                ],
            )
        },
        Panel {
            kind: "stat",
            width: 6,
            ..panel(
                "GPUs that are not ok",
                "short",
                vec![(format!("sum({})", of(m::GPU_HEALTH, "health!=\"ok\"")), "not ok")],
            )
        },
        Panel {
            kind: "stat",
            width: 6,
            ..panel(
                "Breakers open",
                "short",
                vec![(format!("sum({})", of(m::BREAKER_STATE, "state=\"open\"")), "open")],
            )
        },
        Panel {
            kind: "state-timeline",
            width: WIDTH,
            ..panel(
                "State of replicas",
                "short",
                vec![(format!("{} == 1", of(m::REPLICA_STATE, "")), "{{pool_id}}/{{replica_id}} {{state}}")],
            )
        },
        panel("GPU memory: used", "bytes", vec![(of(m::GPU_USED, ""), "{{gpu_uuid}}")]),
        panel(
            "GPU memory: promised to engines, held by others",
            "bytes",
            vec![(of(m::GPU_RESERVED, ""), "ours {{gpu_uuid}}"), (of(m::GPU_FOREIGN, ""), "others {{gpu_uuid}}")],
        ),
        panel("GPU utilisation", "percentunit", vec![(of(m::GPU_UTILISATION, ""), "{{gpu_uuid}}")]),
        panel(
            "Slots in use",
            "percentunit",
            vec![(
                format!("sum by (pool_id) ({}) / sum by (pool_id) ({})", of(m::LEASES_ACTIVE, ""), of(m::SLOTS, "")),
                "{{pool_id}}",
            )],
        ),
        panel("Waiting for a slot", "short", vec![(of(m::LEASES_WAITING, ""), "{{pool_id}}")]),
        panel(
            "Refused leases",
            "ops",
            vec![(sum("pool_id, reason", rate(m::LEASES_REFUSED, "")), "{{pool_id}} {{reason}}")],
        ),
        panel(
            "Requests through the gateway",
            "reqps",
            vec![(sum("pool_id, outcome", rate(m::GATEWAY_REQUESTS, "")), "{{pool_id}} {{outcome}}")],
        ),
        panel(
            "First byte through the gateway",
            "s",
            vec![
                (quantile(0.5, m::GATEWAY_FIRST_BYTE), "p50 {{pool_id}}"),
                (quantile(0.99, m::GATEWAY_FIRST_BYTE), "p99 {{pool_id}}"),
            ],
        ),
        panel(
            "First token through the gateway",
            "s",
            vec![
                (quantile(0.5, m::GATEWAY_FIRST_TOKEN), "p50 {{pool_id}}"),
                (quantile(0.99, m::GATEWAY_FIRST_TOKEN), "p99 {{pool_id}}"),
            ],
        ),
        panel(
            "Time from token to token",
            "s",
            vec![
                (quantile(0.5, m::GATEWAY_TOKEN), "p50 {{pool_id}}"),
                (quantile(0.99, m::GATEWAY_TOKEN), "p99 {{pool_id}}"),
            ],
        ),
        panel(
            "Tokens, as engines count them",
            "short",
            vec![
                (sum("pool_id", rate(m::ENGINE_PROMPT_TOKENS, "")), "read {{pool_id}}"),
                (sum("pool_id", rate(m::ENGINE_GENERATED_TOKENS, "")), "generated {{pool_id}}"),
            ],
        ),
        panel(
            "Requests within engines",
            "short",
            vec![
                (sum("pool_id", of(m::ENGINE_RUNNING, "")), "running {{pool_id}}"),
                (sum("pool_id", of(m::ENGINE_WAITING, "")), "waiting {{pool_id}}"),
            ],
        ),
        panel("KV cache in use", "percentunit", vec![(of(m::ENGINE_KV, ""), "{{pool_id}}/{{replica_id}}")]),
        panel("Engine failures", "ops", vec![(sum("pool_id, class", rate(m::EXITS, "")), "{{pool_id}} {{class}}")]),
        panel("Restarts", "ops", vec![(sum("pool_id", rate(m::RESTARTS, "")), "{{pool_id}}")]),
        panel(
            "Time to Ready",
            "s",
            vec![
                (quantile(0.5, m::START_DURATION), "p50 {{pool_id}}"),
                (quantile(0.99, m::START_DURATION), "p99 {{pool_id}}"),
            ],
        ),
        panel(
            "Reloads and drains",
            "ops",
            vec![
                (sum("pool_id, outcome", rate(m::RELOADS, "")), "reload {{pool_id}} {{outcome}}"),
                (sum("pool_id, outcome", rate(m::DRAINS, "")), "drain {{pool_id}} {{outcome}}"),
            ],
        ),
    ]
}

/// The dashboard as Grafana imports it.
pub(crate) fn dashboard() -> Value {
    let source = json!({ "type": "prometheus", "uid": "${source}" });
    let (mut x, mut y) = (0, 0);
    let mut shown = Vec::new();
    for (id, panel) in (1_u32..).zip(panels()) {
        let height = if panel.kind == "stat" { 4 } else { 8 };
        if x + panel.width > WIDTH {
            (x, y) = (0, y + 8);
        }
        let targets: Vec<Value> = ('A'..).zip(&panel.queries).map(|(name, (expr, legend))| {
            json!({ "refId": name.to_string(), "datasource": source, "expr": expr, "legendFormat": legend })
        }).collect();
        shown.push(json!({
            "id": id, "type": panel.kind, "title": panel.title, "datasource": source, "targets": targets,
            "gridPos": { "x": x, "y": y, "w": panel.width, "h": height },
            "fieldConfig": { "defaults": { "unit": panel.unit, "min": 0 }, "overrides": [] },
        }));
        x += panel.width;
        if x >= WIDTH {
            (x, y) = (0, y + height);
        }
    }
    let variable = |name: &str, label: &str| {
        json!({
            "name": name, "label": name, "type": "query", "datasource": source, "multi": true, "includeAll": true,
            "current": { "text": "All", "value": "$__all" }, "refresh": 2,
            "query": format!("label_values({}, {label})", m::POOL_READY.name),
        })
    };
    json!({
        "title": "pool-managerd", "uid": "pool-managerd", "schemaVersion": 39, "version": 1, "editable": true,
        "tags": ["pool-managerd", "gpu", "llm"], "time": { "from": "now-1h", "to": "now" }, "refresh": "10s",
        "templating": { "list": [
            { "name": "source", "label": "source", "type": "datasource", "query": "prometheus" },
            variable("instance", "instance"), variable("pool", "pool_id"),
        ] },
        "panels": shown,
    })
}

struct Alert {
    name: &'static str,
    expr: String,
    lasts: &'static str,
    severity: &'static str,
    summary: &'static str,
    action: &'static str,
}

fn alerts() -> Vec<Alert> {
    vec![
        Alert {
            name: "PoolManagerdPoolFailed",
            expr: format!(
                "max by (instance, pool_id, replica_id) ({}{{state=~\"failed|fenced\"}}) == 1",
                m::REPLICA_STATE.name
            ),
            lasts: "1m",
            severity: "critical",
            summary: "{{ $labels.pool_id }}/{{ $labels.replica_id }} on {{ $labels.instance }} has failed or is fenced",
            action: "pool-managerd status {{ $labels.pool_id }} says why; a fenced device needs a look at what is left on it",
        },
        Alert {
            name: "PoolManagerdPoolNotReady",
            expr: format!(
                "{} == 0 and on (instance, pool_id) {} == 1 and on (instance, pool_id) {} == 0",
                m::POOL_READY.name,
                m::POOL_LIVE.name,
                m::POOL_HOLD.name
            ),
            lasts: "15m",
            severity: "warning",
            summary: "the pool {{ $labels.pool_id }} on {{ $labels.instance }} has a process and has not been ready for 15 minutes",
            action: "pool-managerd status {{ $labels.pool_id }} and pool-managerd logs {{ $labels.pool_id }}",
        },
        Alert {
            name: "PoolManagerdBreakerOpen",
            expr: format!("max by (instance, pool_id, replica_id) ({}{{state=\"open\"}}) == 1", m::BREAKER_STATE.name),
            lasts: "0m",
            severity: "critical",
            summary: "{{ $labels.pool_id }}/{{ $labels.replica_id }} on {{ $labels.instance }} failed so often that it is not started",
            action: "find the reason in its log, then pool-managerd breaker reset {{ $labels.pool_id }}",
        },
        Alert {
            name: "PoolManagerdCrashLoop",
            expr: format!("sum by (instance, pool_id) (increase({}[15m])) > 3", m::RESTARTS.name),
            lasts: "0m",
            severity: "warning",
            summary: "the engines of {{ $labels.pool_id }} on {{ $labels.instance }} were restarted more than three times in 15 minutes",
            action: "pool-managerd logs {{ $labels.pool_id }}",
        },
        Alert {
            name: "PoolManagerdHangs",
            expr: format!("sum by (instance, pool_id) (increase({}{{class=\"hang\"}}[1h])) > 0", m::EXITS.name),
            lasts: "0m",
            severity: "warning",
            summary: "an engine of {{ $labels.pool_id }} on {{ $labels.instance }} hung and was replaced",
            action: "it said that it was healthy: keep its log for whoever makes the engine",
        },
        Alert {
            name: "PoolManagerdGpuNotOk",
            expr: format!("max by (instance, gpu_uuid, health) ({}{{health!=\"ok\"}}) == 1", m::GPU_HEALTH.name),
            lasts: "1m",
            severity: "critical",
            summary: "a GPU of {{ $labels.instance }} is {{ $labels.health }}: {{ $labels.gpu_uuid }}",
            action: "pool-managerd devices says why and what to do",
        },
        Alert {
            name: "PoolManagerdForeignMemory",
            expr: format!("{} / {} > 0.1", m::GPU_FOREIGN.name, m::GPU_TOTAL.name),
            lasts: "10m",
            severity: "warning",
            summary: "others hold more than a tenth of the memory of a GPU of {{ $labels.instance }}: {{ $labels.gpu_uuid }}",
            action: "pool-managerd devices names them; pools may not find room",
        },
        Alert {
            name: "PoolManagerdSaturated",
            expr: format!(
                "sum by (instance, pool_id) (rate({}{{reason=\"saturated\"}}[5m])) > 0.1",
                m::LEASES_REFUSED.name
            ),
            lasts: "10m",
            severity: "warning",
            summary: "{{ $labels.pool_id }} on {{ $labels.instance }} has refused leases for ten minutes because every slot was taken",
            action: "more slots or replicas, or fewer clients",
        },
        Alert {
            name: "PoolManagerdReloadFailed",
            expr: format!(
                "sum by (instance, pool_id, outcome) (increase({}{{outcome=~\"undone|broken\"}}[15m])) > 0",
                m::RELOADS.name
            ),
            lasts: "0m",
            severity: "warning",
            summary: "a reload of {{ $labels.pool_id }} on {{ $labels.instance }} did not succeed: {{ $labels.outcome }}",
            action: "undone: the old engine serves; broken: nothing serves, reload it to something that can",
        },
        Alert {
            name: "PoolManagerdEnginesBreakOff",
            expr: format!(
                "sum by (instance, pool_id) (increase({}{{outcome=\"broken_off\"}}[10m])) > 5",
                m::GATEWAY_REQUESTS.name
            ),
            lasts: "0m",
            severity: "warning",
            summary: "answers of {{ $labels.pool_id }} on {{ $labels.instance }} were broken off",
            action: "pool-managerd logs {{ $labels.pool_id }}",
        },
    ]
}

/// The rules as Prometheus reads them. JSON is YAML.
pub(crate) fn rules() -> Value {
    let rule = |a: Alert| {
        json!({
            "alert": a.name, "expr": a.expr, "for": a.lasts, "labels": { "severity": a.severity },
            "annotations": { "summary": a.summary, "action": a.action },
        })
    };
    json!({ "groups": [{ "name": "pool-managerd", "rules": alerts().into_iter().map(rule).collect::<Vec<_>>() }] })
}
