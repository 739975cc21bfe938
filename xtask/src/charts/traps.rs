//! What goes wrong in charts of others that run GPUs: every rendering is looked at for each.

use serde_json::Value;

/// Looks at the documents of one rendering and says what is wrong.
type Trap = fn(&[Value]) -> Option<String>;

/// By what goes wrong.
pub(super) const TRAPS: &[(&str, Trap)] = &[
    ("a DaemonSet has no scale", |docs| {
        let daemons = any(docs, &["DaemonSet"]).is_some();
        let scaler = of(docs, &["HorizontalPodAutoscaler", "ScaledObject"])
            .find(|doc| daemons || doc["spec"]["scaleTargetRef"]["kind"] == "DaemonSet");
        scaler.map(name)
    }),
    ("drains of a node never evict pods of a DaemonSet", |docs| {
        any(docs, &["PodDisruptionBudget"])
            .filter(|budget| {
                any(docs, &["DaemonSet"]).is_some() || budget["spec"]["unhealthyPodEvictionPolicy"] != "AlwaysAllow"
            })
            .map(name)
    }),
    ("nothing is left of demand once there is no daemon", |docs| {
        of(docs, &["ScaledObject"])
            .find(|doc| name(doc) == "ScaledObject pool-managerd" && doc["spec"]["minReplicaCount"].as_u64() < Some(1))
            .map(name)
    }),
    ("a fallback of KEDA needs both numbers", |docs| {
        of(docs, &["ScaledObject"])
            .find(|doc| !["failureThreshold", "replicas"].iter().all(|key| doc["spec"]["fallback"][key].is_number()))
            .map(name)
    }),
    (
        "a GPU that the scheduler does not know of is given away twice, and a driver upgrade passes its pod over",
        |docs| {
            daemon(docs, |pod, container| {
                let limits = container["resources"]["limits"].as_object();
                let requested = limits.is_some_and(|all| all.keys().any(|key| key.starts_with("nvidia.com/")));
                let claimed = pod["resourceClaims"].is_array() && container["resources"]["claims"].is_array();
                let all =
                    list(&container["env"]).any(|env| env["name"] == "NVIDIA_VISIBLE_DEVICES" && env["value"] == "all");
                let ways = [requested, claimed, all].iter().filter(|way| **way).count();
                (ways != 1).then(|| format!("{ways} ways to its GPUs"))
            })
        },
    ),
    ("a Service of this name gets into the environment", |docs| {
        pods(docs).find(|(_, pod)| pod["enableServiceLinks"] != false).map(|(name, _)| name)
    }),
    ("a pod with a token of the cluster that it does not need", |docs| {
        pods(docs).find(|(_, pod)| pod["automountServiceAccountToken"] != false).map(|(name, _)| name)
    }),
    ("children of a pod end with it, and its GPUs are free only then", |docs| {
        let wrong = |doc: &&Value| match doc["kind"].as_str() {
            Some("DaemonSet") => doc["spec"]["updateStrategy"]["type"] != "OnDelete",
            Some("StatefulSet") => doc["spec"]["updateStrategy"]["type"] != "RollingUpdate",
            _ => doc["spec"]["strategy"]["rollingUpdate"]["maxSurge"] != 0,
        };
        of(docs, WORKLOADS).filter(|doc| is_ours(doc)).find(wrong).map(name)
    }),
    ("nodes with GPUs are tainted, and pods without requests go first", |docs| {
        daemon(docs, |pod, container| {
            let tolerates =
                list(&pod["tolerations"]).any(|t| t["key"] == "nvidia.com/gpu" && t["operator"] == "Exists");
            let asks = container["resources"]["requests"]["memory"].is_string();
            (!tolerates || !asks).then(|| "no toleration or no requests".to_owned())
        })
    }),
    ("privileges that nobody needs", |docs| {
        pods(docs).find_map(|(name, pod)| {
            let root = pod["securityContext"]["runAsUser"] == 0;
            let wrong = pod["hostIPC"] == true
                || !root && pod["securityContext"]["runAsNonRoot"] != true
                || pod["securityContext"]["seccompProfile"]["type"] != "RuntimeDefault";
            let container = list(&pod["containers"]).filter(|c| c["name"] != "side").find(|container| {
                let context = &container["securityContext"];
                context["privileged"] == true
                    || context["readOnlyRootFilesystem"] != true
                    || context["capabilities"]["drop"] != serde_json::json!(["ALL"])
                    || !root
                        && (context["allowPrivilegeEscalation"] != false || context["capabilities"]["add"].is_array())
            });
            (wrong || container.is_some()).then_some(name)
        })
    }),
    ("the node's network resolves names of the node alone", |docs| {
        let wrong = |pod: &Value| pod["hostNetwork"] == true && pod["dnsPolicy"] != "ClusterFirstWithHostNet";
        pods(docs).find(|(_, pod)| wrong(pod)).map(|(name, _)| name)
    }),
    ("probes that follow an engine end the others with it; those of a slow start end it", |docs| {
        daemon(docs, |_, container| {
            let of = |probe: &str| &container[probe]["httpGet"];
            let follow = of("livenessProbe")["path"] != "/livez" || of("readinessProbe")["path"] != "/readyz";
            let flooded = of("livenessProbe")["port"] != "probes" || of("readinessProbe")["port"] != "probes";
            let start = &container["startupProbe"];
            let time = start["periodSeconds"].as_u64().unwrap_or(1) * start["failureThreshold"].as_u64().unwrap_or(3);
            (follow || flooded || time < 600).then(|| format!("liveness, readiness or {time} s to start"))
        })
    }),
    ("the grace period ends before the drain does", |docs| {
        let config = config(docs)?;
        daemon(docs, |pod, container| {
            let seconds = |key: &str| -> u64 {
                let line = config.lines().find(|line| line.starts_with(key)).unwrap_or_default();
                line.split('"').nth(1).and_then(|text| text.strip_suffix('s')?.parse().ok()).unwrap_or(u64::MAX / 4)
            };
            let sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or(u64::MAX / 4);
            let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
            let (drain, deadline) = (seconds("shutdown_drain"), seconds("shutdown_deadline"));
            (grace <= sleep + deadline || deadline < drain + 10)
                .then(|| format!("{grace} s for {sleep} and {deadline} s"))
        })
    }),
    ("a Secret's files belong to root, and the daemon reads none that others can", |docs| {
        daemon(docs, |pod, _| {
            let context = &pod["securityContext"];
            let mode = if context["runAsUser"] == 0 { 0o400 } else { 0o440 };
            let wrong = list(&pod["volumes"]).find(|v| v["secret"].is_object() && v["secret"]["defaultMode"] != mode);
            (wrong.is_some() || context["fsGroup"] != context["runAsGroup"]).then(|| "mode or group".to_owned())
        })
    }),
    ("requests to a Service carry a Host that the daemon does not know", |docs| {
        let config = config(docs)?;
        let services = of(docs, &["Service"]).filter_map(|doc| doc["metadata"]["name"].as_str());
        let mut missing = services.filter(|name| !config.contains(&format!("\"{name}.pool-managerd.svc\"")));
        missing.next().map(ToOwned::to_owned)
    }),
    ("a Service sends requests to what is no daemon", |docs| {
        let pod = any(docs, &["Pod"])?;
        let selects = |service: &&Value| {
            let wanted = service["spec"]["selector"].as_object();
            wanted.is_some_and(|all| all.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value))
        };
        of(docs, &["Service"]).find(selects).map(name)
    }),
    ("whoever reaches the API can do everything", |docs| {
        let config = config(docs)?;
        let open = config.contains("listen = \"0.0.0.0:") && config.contains("insecure = false");
        (open && !(config.contains("[auth]") && config.contains("[tls]"))).then(|| "no tokens or no TLS".to_owned())
    }),
    ("labels of the scraped win over those of the scraper", |docs| {
        let wrong = |doc: &&Value| list(&doc["spec"]["podMetricsEndpoints"]).any(|e| e["honorLabels"] != false);
        of(docs, &["PodMonitor"]).find(wrong).map(name)
    }),
    ("a change of the config changes no pod", |docs| {
        let pod = of(docs, WORKLOADS).find(|doc| is_ours(doc))?;
        let sum = &pod["spec"]["template"]["metadata"]["annotations"]["checksum/config"];
        sum.as_str().is_none_or(|sum| sum.len() != 64).then(|| name(pod))
    }),
];

/// What only certain values show: numbers stay whole, and text stays what it is.
pub(super) fn said(answers: &[Value]) -> Vec<String> {
    let mut findings = Vec::new();
    let mut seen = 0;
    for answer in answers.iter().filter(|answer| answer["name"].as_str().is_some_and(|name| name.contains(", pools, ")))
    {
        seen += 1;
        let config = config(answer["docs"].as_array().map(Vec::as_slice).unwrap_or_default()).unwrap_or_default();
        for line in ["\"slots\" = 4", "\"context\" = 131072", "\"aliases\" = [\"\\u003cx\\u003e \\u0026 \\\"y\\\"\"]"] {
            if !config.lines().any(|l| l == line) {
                findings.push(format!("{}: the config lacks `{line}`", answer["name"]));
            }
        }
    }
    if seen == 0 {
        findings.push("no rendering has pools".to_owned());
    }
    findings
}

const WORKLOADS: &[&str] = &["DaemonSet", "StatefulSet", "Deployment"];

fn of<'a>(docs: &'a [Value], kinds: &'a [&str]) -> impl Iterator<Item = &'a Value> {
    docs.iter().filter(move |doc| kinds.iter().any(|kind| doc["kind"] == *kind))
}

fn any<'a>(docs: &'a [Value], kinds: &'a [&str]) -> Option<&'a Value> {
    of(docs, kinds).next()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn name(doc: &Value) -> String {
    format!("{} {}", doc["kind"].as_str().unwrap_or_default(), doc["metadata"]["name"].as_str().unwrap_or_default())
}

fn is_ours(doc: &Value) -> bool {
    doc["metadata"]["name"] == "pool-managerd"
}

/// Every pod that a rendering leads to, by the name of what makes it.
fn pods(docs: &[Value]) -> impl Iterator<Item = (String, &Value)> {
    let made = of(docs, WORKLOADS).map(|doc| (name(doc), &doc["spec"]["template"]["spec"]));
    made.chain(of(docs, &["Pod"]).map(|doc| (name(doc), &doc["spec"])))
}

/// Asks the pod of the daemon and its container.
fn daemon(docs: &[Value], wrong: impl Fn(&Value, &Value) -> Option<String>) -> Option<String> {
    let pod = &of(docs, WORKLOADS).find(|doc| is_ours(doc))?["spec"]["template"]["spec"];
    wrong(pod, list(&pod["containers"]).next()?)
}

fn config(docs: &[Value]) -> Option<&str> {
    of(docs, &["ConfigMap"]).find(|doc| is_ours(doc))?["data"]["pool-managerd.toml"].as_str()
}
