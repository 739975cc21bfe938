//! `demo`: the whole daemon on simulated GPUs with stub engines, from nothing but this binary.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use pool_services::PoolControl;

use crate::config::{self, Overrides};
use crate::exit::{BUG, Exit, print};
use crate::serve::{Started, serve};

/// Longest time the first pool may take before the lines are printed without its engine.
const PATIENCE: Duration = Duration::from_secs(15);

/// One pool that serves, and one whose engine keeps crashing.
const CONFIG: &str = r#"
[node]
state_dir = "state"
shutdown_deadline = "20s"

[gpu]
backend = "simulated"
topology = "two-gpus.toml"

[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
args = ["--load-ms", "800", "--vram", "4 GiB"]
vram = "4 GiB"
activation = "preload"
aliases = ["gpt-4o-mini"]
[pool.drain]
stop_grace = "5s"

[[pool]]
id = "flaky"
model = "stub:flaky"
engine = "stub"
args = ["--crash-after-ms", "8000", "--vram", "1 GiB"]
vram = "1 GiB"
activation = "preload"
[pool.drain]
stop_grace = "5s"
"#;

/// Runs the demo until a signal ends it.
///
/// # Errors
/// When the daemon cannot start.
pub async fn demo(listen: SocketAddr) -> Result<(), Exit> {
    let failed = |e: std::io::Error| Exit::new(BUG, format!("cannot prepare the demo: {e}"));
    // Removed when this is dropped, after the last engine is gone.
    let dir = tempfile::Builder::new().prefix("pool-managerd-demo-").tempdir().map_err(failed)?;
    let file = dir.path().join("demo.toml");
    fs::write(&file, CONFIG).map_err(failed)?;
    fs::write(dir.path().join("two-gpus.toml"), gpu_sim::TWO_GPUS).map_err(failed)?;
    let overrides = Overrides { listen: Some(listen.to_string()), ..Overrides::default() };
    let mut config = config::load(Some(&file), &overrides)?;
    // Its state directory is never opened again, so nobody would find its engines.
    config.node.on_exit = config::OnExit::Bound;
    let ended = serve(config, |started| {
        tokio::spawn(introduce(started));
    })
    .await;
    dir.close().map_err(failed)?;
    ended
}

/// Says what runs and what to try, once the first engine serves.
async fn introduce(started: Started) {
    let Ok(id) = "chat".parse() else { return };
    let served = tokio::time::timeout(PATIENCE, async {
        let mut seen = 0;
        while let Ok(pool) = started.manager.wait_pool(&id, seen, PATIENCE).await
            && !pool.ready()
        {
            seen = pool.snapshot;
        }
    });
    // A request would wait for it.
    let _ = served.await;
    // Nothing to do about a stdout that is gone.
    let _ = print(&lines(started.addr));
}

fn lines(addr: SocketAddr) -> String {
    format!(
        "
pool-managerd demo: open http://{addr}/ in a browser

Two SIMULATED GPUs, and two pools of stub engines (made-up words, no model):
  chat   serves
  flaky  crashes 8 s after it became ready, and is restarted with growing delays until its breaker opens

Try, in another terminal:
  # a chat completion, as OpenAI's clients ask for one
  curl -s http://{addr}/v1/chat/completions -H 'Content-Type: application/json' -d '{{\"model\":\"chat\",\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}],\"max_tokens\":16}}'
  # how the pools stand: once, and live
  pool-managerd status --server http://{addr}
  pool-managerd top --server http://{addr}
  curl -s http://{addr}/v1/pools/flaky
  # drain the chat pool, and bring it back
  curl -s -X POST http://{addr}/v1/pools/chat/drain -H 'Content-Type: application/json' -d '{{\"deadline_ms\":2000}}'
  curl -s -X POST http://{addr}/v1/pools/chat/preload
  # metrics
  curl -s http://{addr}/metrics

Ctrl-C stops everything and leaves nothing behind.

"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_config_is_valid() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("demo.toml");
        fs::write(&file, CONFIG).unwrap();
        assert_eq!(config::load(Some(&file), &Overrides::default()).unwrap().pools.len(), 2);
    }

    #[test]
    fn the_lines_can_be_pasted() {
        let text = lines("127.0.0.1:9200".parse().unwrap());
        assert!(text.contains("curl -s http://127.0.0.1:9200/v1/pools/flaky\n") && !text.contains("{{"));
    }
}
