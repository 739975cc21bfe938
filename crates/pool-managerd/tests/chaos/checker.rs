//! The judge. It looks at processes, cgroups and files only, and believes nobody.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use crate::support::{alive, eventually};

/// Watches one state directory until it is dropped: never two generations of a replica at once.
pub(crate) struct Checker {
    run: PathBuf,
    over: Arc<AtomicBool>,
    watch: Option<JoinHandle<Vec<String>>>,
    strangers: Vec<Stranger>,
}

impl Checker {
    pub(crate) fn of(dir: &Path) -> Self {
        let (run, over) = (dir.join("state/run"), Arc::new(AtomicBool::new(false)));
        let (looked_at, until) = (run.clone(), Arc::clone(&over));
        let watch = std::thread::spawn(move || {
            let mut found = Vec::new();
            while !until.load(Ordering::Relaxed) {
                found.extend(doubles(&looked_at));
                std::thread::sleep(Duration::from_millis(40));
            }
            found
        });
        Self { run, over, watch: Some(watch), strangers: Stranger::pair(dir) }
    }

    /// The last judgement, once the daemon has stopped.
    pub(crate) fn nothing_is_left(mut self, dir: &Path) {
        self.over.store(true, Ordering::Relaxed);
        let doubles = self.watch.take().unwrap().join().unwrap();
        assert!(doubles.is_empty(), "two generations at once: {doubles:?}");
        // What was killed may be a moment on its way.
        let orphans = || processes_of(dir);
        eventually(|| orphans().is_empty().then_some(()));
        for start in starts(&self.run) {
            for procs in start["cgroup_procs"].as_array().into_iter().flatten() {
                let left = fs::read_to_string(procs.as_str().unwrap()).unwrap_or_default();
                assert!(left.is_empty(), "in {procs}: {left}");
            }
        }
        self.strangers.iter().for_each(Stranger::was_left_alone);
    }

    pub(crate) fn strangers_were_left_alone(&self) {
        self.strangers.iter().for_each(Stranger::was_left_alone);
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// What shims wrote of their starts.
pub(crate) fn starts(run: &Path) -> Vec<Value> {
    let below = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
    let generations = below(run).into_iter().flat_map(|replica| below(&replica));
    generations
        .filter_map(|dir| {
            let mut start: Value = serde_json::from_slice(&fs::read(dir.join("start.json")).ok()?).ok()?;
            start["replica"] = dir.parent()?.file_name()?.to_str()?.into();
            Some(start)
        })
        .collect()
}

/// Whether the very process that was recorded lives.
fn lives(pid: &Value, start_time: &Value) -> bool {
    let pid = pid.as_u64().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields.get(19).is_some_and(|t| t.parse().ok() == start_time.as_u64()) && !matches!(fields[0], "Z" | "X")
}

/// Replicas of which more than one generation is there, by main process or by shim.
fn doubles(run: &Path) -> Vec<String> {
    let mut there: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for start in starts(run) {
        let there_still =
            lives(&start["pid"], &start["start_time"]) || lives(&start["shim_pid"], &start["shim_start_time"]);
        if there_still {
            there.entry(start["replica"].as_str().unwrap().to_owned()).or_default().push(start);
        }
    }
    there.into_iter().filter(|(_, v)| v.len() > 1).map(|(k, v)| format!("{k}: {v:?}")).collect()
}

/// Whatever runs in a directory or names it, but for this very process and the strangers.
pub(crate) fn processes_of(dir: &Path) -> Vec<String> {
    let name = dir.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        let ours = cwd.starts_with(dir) || cmdline.contains(name);
        if ours && !cmdline.contains(STRANGE) && pid != std::process::id() && alive(pid) {
            found.push(format!("{pid}: {cmdline}"));
        }
    }
    found
}

const STRANGE: &str = "stranger-to-pool-managerd";

/// Somebody else's process whose command line is as one of ours. It writes down every signal that can be caught.
struct Stranger {
    child: Child,
    told: PathBuf,
}

impl Stranger {
    /// One like a shim, one like an engine.
    fn pair(dir: &Path) -> Vec<Self> {
        let launch = dir.join("state/run/ready-r0/1/launch.json");
        let shim = ["engine-shim", launch.to_str().unwrap()];
        let engine = ["stub-engine", "--model", "stub:ready", "--port", "10001", "--host", "127.0.0.1"];
        vec![Self::start(&dir.join("stranger-1"), &shim), Self::start(&dir.join("stranger-2"), &engine)]
    }

    fn start(told: &Path, like: &[&str]) -> Self {
        // It waits for us on its stdin, so that it ends with us; a signal that comes is on file.
        let script = "for s in HUP INT QUIT USR1 USR2 TERM CONT; do trap \"echo $s >> '$1'\" $s; done; while :; do \
            read -r line || [ $? -gt 128 ] || exit 0; done";
        let child = Command::new("bash")
            .args(["-c", script, STRANGE])
            .arg(told)
            .args(like)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, told: told.to_owned() }
    }

    fn was_left_alone(&self) {
        assert!(alive(self.child.id()), "a stranger was killed");
        assert!(!self.told.exists(), "a stranger was signalled: {:?}", fs::read_to_string(&self.told));
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // A child of ours that was not waited for: its pid is its own.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
