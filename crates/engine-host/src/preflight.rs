//! The engines' and the machine's half of the preflight report.

use std::fs;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use pool_domain::isolation::Isolation;
use pool_services::preflight::Finding;
use rustix::process::{Resource, getrlimit};

use crate::decl::{EngineDecl, Kind, Mode};
use crate::discover::Discovery;
use crate::isolation::can_keep;
use crate::kinds;

/// Open files that an engine with many clients needs, and that systemd gives a service at most unless told otherwise.
const NOFILE: u64 = 65_536;
/// What engines of several processes need to talk to each other (NCCL's own advice for containers is a GiB).
const SHARED_MEMORY: u64 = 1 << 30;
/// Less is used up by a log.
const STATE_SPACE: u64 = 256 << 20;
/// The smallest models that are of use take about this.
const MODEL_SPACE: u64 = 10 << 30;

/// What the machine is asked for.
#[derive(Debug, Clone)]
pub struct Places {
    /// Where durable facts and engines' logs are.
    pub state_dir: PathBuf,
    /// Where fetched models are.
    pub cache_dir: PathBuf,
}

/// Each declared engine: whether it is there, and its version. One that is not `needed` may be missing.
pub async fn engines(decls: &[EngineDecl], needed: impl Fn(&EngineDecl) -> bool) -> Vec<Finding> {
    let discovery = Discovery::default();
    let mut findings = Vec::new();
    for decl in decls {
        let what = format!("engine {}", decl.name);
        let (path, found) = match (&decl.mode, decl.kind) {
            (_, Kind::Stub) => continue,
            (Mode::External { addr }, _) => {
                findings.push(Finding::fine(what, format!("external, at {addr}")));
                continue;
            }
            (Mode::Binary { path }, Kind::Vllm) => {
                (path, Discovery::unasked(path, kinds::vllm::version_beside).await.map(std::sync::Arc::new))
            }
            (Mode::Binary { path }, Kind::LlamaCpp) => (path, discovery.program(path, &[]).await),
        };
        findings.push(match found {
            Ok(program) => Finding::fine(what, format!("{} at {}", program.version, program.path.display())),
            Err(failure) if needed(decl) => Finding::broken(what, failure.detail, remedy(decl.kind, path)),
            Err(failure) => {
                let remedy = format!("no pool needs it; to use it, {}", remedy(decl.kind, path));
                Finding::weak(what, failure.detail, remedy)
            }
        });
    }
    findings
}

fn remedy(kind: Kind, path: &Path) -> String {
    let name = path.display();
    match kind {
        Kind::LlamaCpp => format!(
            "put llama.cpp's server (https://github.com/ggml-org/llama.cpp/releases) in PATH as `{name}`, or name its file \
             as `path` of the engine"
        ),
        Kind::Vllm => format!(
            "install vLLM (`uv tool install vllm`) so that `{name}` is in PATH, or name its file as `path` of the engine"
        ),
        Kind::Stub => String::new(),
    }
}

/// What was read off the machine.
#[derive(Debug, Clone, PartialEq)]
struct Machine {
    memory: Option<(u64, u64)>,
    shared_memory: Option<u64>,
    nofile: Option<u64>,
    state_space: Option<u64>,
    cache_space: Option<u64>,
    cgroups: Result<(), String>,
}

/// Memory, disks, limits and cgroups. `several` says that an engine of several processes is declared.
#[must_use]
pub fn machine(places: &Places, decls: &[EngineDecl]) -> Vec<Finding> {
    let several = decls.iter().any(|d| d.kind == Kind::Vllm && matches!(d.mode, Mode::Binary { .. }));
    let keep = Isolation { memory_max: Some(1 << 30), ..Isolation::default() };
    let found = Machine {
        memory: fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory(&text)),
        shared_memory: rustix::fs::statvfs("/dev/shm").ok().map(|fs| fs.f_blocks * fs.f_frsize),
        nofile: getrlimit(Resource::Nofile).maximum,
        state_space: space(&places.state_dir),
        cache_space: space(&places.cache_dir),
        cgroups: can_keep(&keep).map_err(|unkept| unkept.hint),
    };
    judge(&found, places, several)
}

/// Total and available.
fn memory(meminfo: &str) -> Option<(u64, u64)> {
    let of = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some((of("MemTotal")?, of("MemAvailable")?))
}

/// Bytes free for this user where a directory is, or will be.
fn space(dir: &Path) -> Option<u64> {
    let there = dir.ancestors().find(|dir| dir.exists())?;
    rustix::fs::statvfs(there).ok().map(|fs| fs.f_bavail * fs.f_frsize)
}

fn judge(machine: &Machine, places: &Places, several: bool) -> Vec<Finding> {
    let size = |bytes: u64| ByteSize(bytes).to_string();
    let mut findings = Vec::new();
    if let Some((total, available)) = machine.memory {
        let found = format!("{} of {} available", size(available), size(total));
        findings.push(if available < total / 10 {
            Finding::weak("host memory", found, "models are read through it: end what holds it, or add memory")
        } else {
            Finding::fine("host memory", found)
        });
    }
    let disk = |what: &str, dir: &Path, free: Option<u64>, needed: u64| match free {
        None => Finding::weak(what, format!("{} cannot be looked at", dir.display()), "make it readable for this user"),
        Some(free) if free < needed => {
            let found = format!("{} free at {}", size(free), dir.display());
            Finding::weak(what, found, format!("{} are of use: make room, or name another place", size(needed)))
        }
        Some(free) => Finding::fine(what, format!("{} free at {}", size(free), dir.display())),
    };
    findings.push(disk("disk for state", &places.state_dir, machine.state_space, STATE_SPACE));
    findings.push(disk("disk for models", &places.cache_dir, machine.cache_space, MODEL_SPACE));
    if let Some(bytes) = machine.shared_memory {
        let found = size(bytes);
        findings.push(if several && bytes < SHARED_MEMORY {
            let remedy = "`mount -o remount,size=8G /dev/shm`; for a container --shm-size=8g, for a pod an emptyDir with medium: Memory";
            Finding::weak("/dev/shm", found, remedy)
        } else {
            Finding::fine("/dev/shm", found)
        });
    }
    let files = machine.nofile.map_or_else(|| "no limit".to_owned(), |n| n.to_string());
    findings.push(match machine.nofile {
        Some(n) if n < NOFILE => {
            let remedy = format!("LimitNOFILE={NOFILE} in the systemd unit, or `ulimit -Hn {NOFILE}` before the start");
            Finding::weak("open files", files, remedy)
        }
        _ => Finding::fine("open files", files),
    });
    findings.push(match &machine.cgroups {
        Ok(()) => Finding::fine("cgroups", "engines get one each, and memory_max can be kept"),
        Err(hint) => Finding::weak("cgroups", "none that limits memory may be made", hint.clone()),
    });
    findings
}

#[cfg(test)]
mod tests {
    use pool_services::preflight::Outcome;

    use super::*;

    fn places() -> Places {
        Places { state_dir: "/s".into(), cache_dir: "/c".into() }
    }

    fn good() -> Machine {
        Machine {
            memory: Some((64 << 30, 32 << 30)),
            shared_memory: Some(8 << 30),
            nofile: Some(1 << 20),
            state_space: Some(100 << 30),
            cache_space: Some(100 << 30),
            cgroups: Ok(()),
        }
    }

    #[test]
    fn a_good_machine_is_fine_and_each_lack_is_told_with_a_remedy() {
        assert!(judge(&good(), &places(), true).iter().all(|f| f.outcome == Outcome::Fine && f.remedy.is_empty()));
        let lacks = [
            ("host memory", Machine { memory: Some((64 << 30, 1 << 30)), ..good() }),
            ("/dev/shm", Machine { shared_memory: Some(64 << 20), ..good() }),
            ("open files", Machine { nofile: Some(1024), ..good() }),
            ("disk for state", Machine { state_space: Some(0), ..good() }),
            ("disk for models", Machine { cache_space: None, ..good() }),
            ("cgroups", Machine { cgroups: Err("as root".into()), ..good() }),
        ];
        for (what, machine) in lacks {
            let told = judge(&machine, &places(), true);
            let weak: Vec<&str> = told.iter().filter(|f| f.outcome != Outcome::Fine).map(|f| f.what.as_str()).collect();
            assert_eq!(weak, [what]);
            assert!(told.iter().all(|f| f.outcome == Outcome::Fine || !f.remedy.is_empty()), "{told:?}");
        }
        let small = Machine { shared_memory: Some(64 << 20), ..good() };
        assert!(judge(&small, &places(), false).iter().all(|f| f.outcome == Outcome::Fine));
    }

    #[test]
    fn files_of_the_kernel_are_read() {
        assert_eq!(memory("MemTotal:       1024 kB\nMemAvailable:    512 kB\n"), Some((1 << 20, 1 << 19)));
        assert_eq!(memory("MemTotal: 1 kB\n"), None);
    }

    #[tokio::test]
    async fn an_engine_that_is_missing_is_told_with_where_to_get_it() {
        let decl = |path: &str| EngineDecl {
            name: "e".parse().unwrap(),
            kind: Kind::LlamaCpp,
            mode: Mode::Binary { path: path.into() },
        };
        let told = engines(&[decl("/nowhere/llama-server")], |_| false).await;
        assert_eq!(told[0].outcome, Outcome::Weak);
        let told = engines(&[decl("/nowhere/llama-server")], |_| true).await;
        assert_eq!(told[0].outcome, Outcome::Broken);
        assert!(told[0].remedy.contains("llama.cpp/releases"), "{told:?}");
    }
}
