//! Which values the chart is rendered with, and which it must refuse.

use serde_json::{Value, json};

/// One rendering.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: String,
    /// A file of `presets/`; empty for none.
    pub(super) preset: &'static str,
    /// Of Kubernetes, that Helm is told.
    pub(super) version: String,
    /// Versions whose schemas it is held against.
    pub(super) valid_for: Vec<String>,
    pub(super) values: Value,
    pub(super) flags: Vec<String>,
}

impl Case {
    /// A preset as it is, without what only `helm test` uses.
    pub(super) fn plain(preset: &'static str, version: &str) -> Self {
        let flags = vec!["--skip-tests".to_owned()];
        Self {
            name: preset.to_owned(),
            preset,
            version: version.to_owned(),
            valid_for: Vec::new(),
            values: json!({}),
            flags,
        }
    }
}

const OPENSHIFT: &[&str] = &["--api-versions", "security.openshift.io/v1/SecurityContextConstraints"];
const KINDS: &[&str] = &["DaemonSet", "StatefulSet", "Deployment"];

/// What no kind minds, by name.
fn variants() -> Vec<(&'static str, Value)> {
    let token = json!({ "secretName": "read-token" });
    vec![
        ("as it is", json!({})),
        (
            "watched",
            json!({ "readToken": token, "monitoring": {
            "podMonitor": { "enabled": true, "labels": { "release": "prometheus" } },
            "prometheusRule": { "enabled": true }, "grafana": { "enabled": true } } }),
        ),
        ("by claim", json!({ "gpu": { "mode": "claim", "allocationMode": "ExactCount", "count": 2 } })),
        (
            "every GPU",
            json!({ "gpu": { "mode": "all", "exclusiveNodes": true, "migMonitor": true, "hostPID": true },
            "runAs": { "user": 0, "group": 0 }, "priorityClassName": "system-node-critical" }),
        ),
        ("a slice", json!({ "gpu": { "resourceName": "nvidia.com/mig-1g.10gb", "runtimeClassName": "nvidia" } })),
        ("node's network", json!({ "hostNetwork": true, "networkPolicy": { "enabled": false } })),
        ("private", json!({ "api": { "expose": false }, "auth": { "secretName": "" }, "tls": { "secretName": "" } })),
        ("insecure", json!({ "api": { "insecure": true }, "auth": { "secretName": "" }, "tls": { "secretName": "" } })),
        (
            "node's directories",
            json!({ "state": { "type": "hostPath" }, "cache": { "type": "hostPath" },
            "hostPathsPrepared": true, "modelsHostPath": "/srv/models" }),
        ),
        (
            "pools",
            json!({ "startup": { "waitForPool": "a" }, "config": { "engines": {
            "own": { "kind": "llama.cpp", "mode": "binary", "path": "/app/llama-server" } }, "pool": [
            { "id": "a", "model": "file:/srv/models/a.gguf", "engine": "own", "slots": 4, "context": 131_072, "args": ["--flash-attn", "on"],
              "backoff": { "initial": "2s", "factor": 1.5 }, "aliases": ["<x> & \"y\""] },
            { "id": "b", "model": "file:/srv/models/b.gguf", "activation": "on_demand" } ] } }),
        ),
        (
            "all else",
            json!({ "image": { "digest": format!("sha256:{}", "0".repeat(64)), "pullSecrets": [{ "name": "pull" }] },
            "terminationGracePeriodSeconds": 600, "podAnnotations": { "a": "b" }, "podLabels": { "c": "d" },
            "nodeSelector": { "pool": "gpu" }, "extraEnv": [{ "name": "HF_HOME", "value": "/tmp" }],
            "extraContainers": [{ "name": "side", "image": "side:1" }], "gpuNodesOnly": false,
            "extraObjects": [{ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "more" } }] }),
        ),
    ]
}

/// What takes a kind that can be scaled.
fn scaled() -> Vec<(&'static str, Value)> {
    let token = json!({ "secretName": "read-token" });
    vec![
        ("keda", json!({ "readToken": token, "autoscaling": { "type": "keda", "pool": "main" } })),
        ("keda by prometheus", json!({ "autoscaling": { "type": "keda", "trigger": "prometheus" } })),
        ("hpa", json!({ "autoscaling": { "type": "hpa", "max": 3 } })),
        ("budget", json!({ "podDisruptionBudget": { "enabled": true } })),
    ]
}

/// What a kind needs of what presets say for another.
fn of_kind(kind: &str) -> Value {
    match kind {
        "StatefulSet" => json!({ "kind": kind, "replicas": 3 }),
        "Deployment" => json!({ "kind": kind, "replicas": 3, "cache": { "type": "emptyDir" } }),
        _ => json!({ "kind": kind, "podDisruptionBudget": { "enabled": false }, "cache": { "type": "emptyDir" } }),
    }
}

/// Every preset, kind and variant for every version.
pub(super) fn cases(presets: &[&'static str], versions: &[&str]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &preset in presets {
        for kind in KINDS {
            let more = if *kind == "DaemonSet" { Vec::new() } else { scaled() };
            for (name, values) in variants().into_iter().chain(more) {
                // What is rendered depends on the version for claims alone: most is rendered once, and held against all.
                let able: Vec<_> = versions.iter().filter(|v| name != "by claim" || **v != "1.32").collect();
                let Some(newest) = able.last() else { continue };
                let rendered = if name == "as it is" { able.clone() } else { vec![*newest] };
                for version in rendered {
                    let mut all = of_kind(kind);
                    merge(&mut all, &values);
                    let flags: &[&str] = if name == "insecure" { OPENSHIFT } else { &[] };
                    cases.push(Case {
                        name: format!("{preset}, {kind}, {name}, {version}"),
                        preset,
                        version: (**version).to_owned(),
                        valid_for: able.iter().map(|v| (**v).to_owned()).collect(),
                        values: all,
                        flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
                    });
                }
            }
        }
    }
    cases
}

/// Lays one object over another, as Helm does with files of values.
fn merge(to: &mut Value, from: &Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            for (key, value) in from {
                merge(to.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (to, from) => *to = from.clone(),
    }
}

/// Values that must be refused, with a part of the sentence that says why.
pub(super) fn contradictions() -> Vec<(Case, &'static str)> {
    let deployment = |more: Value| {
        let mut values = json!({ "kind": "Deployment" });
        merge(&mut values, &more);
        values
    };
    [
        ("no tokens", json!({ "auth": { "secretName": "" } }), "auth.secretName is empty"),
        ("no certificate", json!({ "tls": { "secretName": "" } }), "tls.secretName is empty"),
        ("too little grace", json!({ "terminationGracePeriodSeconds": 79 }), "raise it to 80"),
        (
            "more drain than grace",
            json!({ "terminationGracePeriodSeconds": 90, "drain": { "leaseSeconds": 300 } }),
            "raise it to 320",
        ),
        ("scaled daemons", json!({ "autoscaling": { "type": "keda" } }), "scale the nodes"),
        ("scaled daemons by hpa", json!({ "autoscaling": { "type": "hpa" } }), "has one pod on each node"),
        ("budget of daemons", json!({ "podDisruptionBudget": { "enabled": true } }), "protect nothing"),
        ("replicas of daemons", json!({ "replicas": 2 }), "leave replicas out"),
        ("GPUs behind the scheduler", json!({ "gpu": { "mode": "all" } }), "gpu.exclusiveNodes to true"),
        ("slices without GPUs", json!({ "gpu": { "migMonitor": true } }), "Set gpu.mode to all"),
        ("capability for nobody", json!({ "privileged": true }), "Set runAs.user to 0"),
        ("root's directory", json!({ "state": { "type": "hostPath" } }), "hostPathsPrepared"),
        ("no claim", deployment(json!({ "cache": { "type": "persistentVolumeClaim" } })), "name a claim"),
        ("one claim for all", json!({ "state": { "type": "persistentVolumeClaim", "claimName": "x" } }), "never share"),
        ("policy for the node's network", json!({ "hostNetwork": true }), "does not hold"),
        (
            "private and watched",
            json!({ "api": { "expose": false }, "monitoring": { "podMonitor": { "enabled": true } } }),
            "neither Prometheus",
        ),
        (
            "watched without token",
            json!({ "monitoring": { "podMonitor": { "enabled": true } } }),
            "readToken.secretName",
        ),
        ("keda without token", deployment(json!({ "autoscaling": { "type": "keda" } })), "readToken.secretName"),
        ("more than most", deployment(json!({ "autoscaling": { "type": "hpa", "min": 9 } })), "min is at most max"),
        (
            "what the chart sets",
            json!({ "config": { "node": { "listen": "0.0.0.0:1" } } }),
            "set api.expose and api.port instead",
        ),
        ("place of the cache", json!({ "config": { "models": { "cache_dir": "/x" } } }), "set cache instead"),
        (
            "simulated",
            json!({ "config": { "gpu": { "backend": "simulated", "topology": "t" } } }),
            "pool-managerd demo",
        ),
        ("waits for nobody", json!({ "startup": { "waitForPool": "x" } }), "has no such pool"),
        (
            "another user",
            json!({ "config": { "pool": [{ "id": "a", "model": "stub:a", "isolation": { "run_as": "x" } }] } }),
            "Leave run_as out",
        ),
        // Of the schema.
        ("unknown", json!({ "imagee": {} }), "'imagee' not allowed"),
        ("unknown below", json!({ "gpu": { "modes": "all" } }), "'modes' not allowed"),
        (
            "unknown key of a pool",
            json!({ "config": { "pool": [{ "id": "a", "model": "stub:a", "slot": 1 }] } }),
            "'slot' not allowed",
        ),
        ("no kind", json!({ "kind": "Job" }), "/kind"),
        (
            "none at all",
            json!({ "kind": "Deployment", "autoscaling": { "type": "hpa", "min": 0 } }),
            "/autoscaling/min",
        ),
        ("digest", json!({ "image": { "digest": "sha256:abc" } }), "/image/digest"),
    ]
    .into_iter()
    .map(|(name, values, sentence)| (refused(name, "1.37", values), sentence))
    .chain([(refused("claims before 1.34", "1.32", json!({ "gpu": { "mode": "claim" } })), "need Kubernetes 1.34")])
    .collect()
}

fn refused(name: &str, version: &str, values: Value) -> Case {
    let name = format!("contradiction: {name}");
    Case { name, preset: "", version: version.to_owned(), valid_for: Vec::new(), values, flags: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_laid_over_each_other_key_by_key() {
        let mut to = json!({ "a": { "b": 1, "c": [1] }, "d": 2 });
        merge(&mut to, &json!({ "a": { "c": [2], "e": null }, "d": { "f": 3 } }));
        assert_eq!(to, json!({ "a": { "b": 1, "c": [2], "e": null }, "d": { "f": 3 } }));
    }

    #[test]
    fn every_preset_meets_every_kind_and_version() {
        let cases = cases(&["shared", "dedicated"], &["1.32", "1.37"]);
        for preset in ["shared", "dedicated"] {
            for kind in KINDS {
                for version in ["1.32", "1.37"] {
                    let name = format!("{preset}, {kind}, as it is, {version}");
                    assert!(cases.iter().any(|case| case.name == name), "{name}");
                }
            }
        }
    }
}
