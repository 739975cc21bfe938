//! What outlives a daemon, seen from outside.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;

use serde_json::Value;
use support::{Daemon, eventually};

#[test]
fn a_crash_loop_is_not_reset_by_restarting_the_daemon() {
    let config = r#"
[[pool]]
id = "loop"
model = "stub:loop"
engine = "stub"
args = ["--crash-after-ms", "1", "--exit-code", "3"]
activation = "preload"
[pool.backoff]
initial = "10ms"
max = "50ms"
[pool.breaker]
failed_starts = 3
early_crashes = 3
open_for = "290s"
"#;
    let number = |p: &Value, name: &str| p["replicas"][0][name].as_u64().unwrap();
    let rest = |p: &Value| p["replicas"][0]["backoff"]["next_start_in_ms"].as_u64().unwrap();
    let opens = |p: &Value| p["state"] == "waiting" && p["breaker"] == "open";
    let mut daemon = Daemon::start(config);
    let mut before = daemon.until("loop", opens);
    for signal in ["KILL", "TERM", "TERM"] {
        if signal == "KILL" {
            // It is written beside the work, and a daemon that is killed has no last word.
            let record = daemon.dir().join("state/ledger/loop.json.copy");
            eventually(|| fs::read_to_string(&record).ok().filter(|text| text.contains("\"open\"")));
        }
        daemon = Daemon::start_in(daemon.end(signal), config);
        let after = daemon.until("loop", opens);
        assert_eq!(number(&after, "generation"), number(&before, "generation"), "{signal}: {after:#}");
        assert_eq!(number(&after, "restart_count"), number(&before, "restart_count"), "{signal}: {after:#}");
        assert!(rest(&after) <= rest(&before), "{signal}: {after:#}");
        before = after;
    }
    let refused = daemon.post("/v1/pools/loop/leases", r#"{"ttl_ms":1000}"#);
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("POOL_UNAVAILABLE")), "{refused:?}");
    // A person may close it, and that stays, too.
    assert_eq!(daemon.post("/v1/pools/loop/breaker/reset", "{}").status, 204);
    let again = daemon.until("loop", opens);
    assert!(number(&again, "generation") > number(&before, "generation"), "{again:#}");
    assert_eq!(daemon.stop(), Some(0));
}
