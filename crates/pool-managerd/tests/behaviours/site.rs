//! What a scenario is about: the pools it declares, the daemon, and who asked for what.

use std::collections::BTreeMap;
use std::fmt;
use std::thread::JoinHandle;

use cucumber::World;
use serde_json::Value;

use crate::support::{Answer, Daemon, Engines, engine_ports, eventually, request};

/// A pool as it is put together.
#[derive(Default)]
pub(crate) struct Declared {
    pub(crate) id: String,
    /// Keys and tables, as in the config.
    pub(crate) keys: BTreeMap<&'static str, String>,
    pub(crate) tables: String,
    pub(crate) args: Vec<String>,
}

impl Declared {
    fn text(&self) -> String {
        let mut keys = self.keys.clone();
        keys.entry("model").or_insert_with(|| format!("{:?}", format!("stub:{}", self.id)));
        let keys: String = keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        let (id, args, tables) = (&self.id, &self.args, &self.tables);
        format!("[[pool]]\nid = \"{id}\"\nengine = \"stub\"\nargs = {args:?}\n{keys}{tables}\n")
    }
}

/// Everything that a scenario has to do with.
#[derive(World)]
pub(crate) struct Site {
    pub(crate) dir: Option<tempfile::TempDir>,
    pub(crate) pools: Vec<Declared>,
    /// Further lines of `[node]`, and whole tables.
    pub(crate) node: String,
    pub(crate) tables: String,
    daemon: Option<Daemon>,
    /// The pool that "it" is.
    pub(crate) at: String,
    /// Pools as they were when they were first seen ready.
    pub(crate) before: BTreeMap<String, Value>,
    /// What each client was granted.
    pub(crate) leases: BTreeMap<String, Value>,
    pub(crate) asking: BTreeMap<String, JoinHandle<Answer>>,
    /// The last answer, to whoever asked.
    pub(crate) answer: Option<Answer>,
    pub(crate) plan: Option<Value>,
}

impl Default for Site {
    fn default() -> Self {
        Self {
            dir: Some(tempfile::tempdir().unwrap()),
            pools: Vec::new(),
            node: String::new(),
            tables: String::new(),
            daemon: None,
            at: String::new(),
            before: BTreeMap::new(),
            leases: BTreeMap::new(),
            asking: BTreeMap::new(),
            answer: None,
            plan: None,
        }
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pools: Vec<_> = self.pools.iter().map(|p| &p.id).collect();
        f.debug_struct("Site").field("pools", &pools).field("leases", &self.leases).finish_non_exhaustive()
    }
}

impl Site {
    /// The pool that is being declared.
    pub(crate) fn declared(&mut self) -> &mut Declared {
        self.pools.last_mut().expect("a pool is declared first")
    }

    pub(crate) fn start(&mut self) {
        let pools: String = self.pools.iter().map(Declared::text).collect();
        let node = format!("[node]\nstate_dir = \"state\"\nengine_ports = \"{}\"\n{}", engine_ports(), self.node);
        let daemon = Daemon::start_in(self.dir.take().expect("one daemon a scenario"), &(node + &self.tables + &pools));
        // The API answers before the pools are there.
        eventually(|| (daemon.get("/v1/pools").status == 200).then_some(()));
        self.daemon = Some(daemon);
    }

    /// However a scenario goes, its daemon ends in order and leaves nothing.
    pub(crate) fn end(&mut self) {
        let Some(daemon) = self.daemon.take() else { return };
        let engines = Engines::of(&daemon);
        engines.starts();
        assert_eq!(daemon.stop(), Some(0));
        assert!(engines.running().is_empty(), "engines are left");
    }

    pub(crate) fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("the daemon runs")
    }

    pub(crate) fn daemon_mut(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("the daemon runs")
    }

    /// The pool that "it" is, once it looks so.
    pub(crate) fn until(&self, wanted: impl FnMut(&Value) -> bool) -> Value {
        self.daemon().until(&self.at, wanted)
    }

    pub(crate) fn pool(&self) -> Value {
        self.daemon().pool(&self.at)
    }

    pub(crate) fn post(&mut self, path: &str, body: &Value) {
        self.answer = Some(self.daemon().post(path, &body.to_string()));
    }

    pub(crate) fn answer(&self) -> &Answer {
        self.answer.as_ref().expect("somebody asked")
    }
}

/// The answer of an engine at this address to a short request.
pub(crate) fn completion(endpoint: &str) -> String {
    let addr = endpoint.trim_start_matches("http://");
    let answer = request(addr, "POST", "/completion", Some(r#"{"prompt":"hello","n_predict":3}"#));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["content"].as_str().unwrap().to_owned()
}

/// An error with this code and a hint.
pub(crate) fn assert_refused(answer: &Answer, code: &str) {
    assert!(answer.status >= 400, "{answer:?}");
    let problem = answer.json();
    assert_eq!(problem["code"], code, "{answer:?}");
    assert!(problem["hint"].is_string(), "{answer:?}");
}

/// Its time to come back, in whole seconds.
pub(crate) fn retry_after(answer: &Answer) -> u64 {
    let head = answer.head.to_ascii_lowercase();
    let value = head.lines().find_map(|line| line.strip_prefix("retry-after: "));
    value.and_then(|v| v.trim().parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

/// A time as operators write it, in milliseconds.
pub(crate) fn millis(text: &str) -> u64 {
    u64::try_from(humantime::parse_duration(text).unwrap().as_millis()).unwrap()
}
