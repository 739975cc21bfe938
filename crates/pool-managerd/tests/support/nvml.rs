//! A node whose driver library is the stand-in.

use std::path::PathBuf;

use nvml_standin::script::{Block, EVERY_CALL, Event};
use nvml_standin::{Installed, Script};
use serde_json::Value;

use super::Daemon;

/// The script of one of the topologies that are shipped.
pub fn topology(name: &str) -> Script {
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../nvml-standin/topologies")).join(name);
    Script::parse(&std::fs::read_to_string(file).unwrap()).unwrap()
}

/// UUID of the n-th GPU of a topology.
pub fn gpu(n: u32) -> String {
    format!("GPU-51000000-0000-4000-8000-{n:012x}")
}

/// UUID of the n-th slice of a topology.
pub fn slice(n: u32) -> String {
    format!("MIG-51000000-0000-4000-8000-{:012x}", 0xa0 + n)
}

/// The library, and what it plays.
pub struct Node {
    pub library: Installed,
    pub script: Script,
    dir: tempfile::TempDir,
}

impl Node {
    pub fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { library: Installed::into_dir(dir.path(), &script).unwrap(), script, dir }
    }

    pub fn of(name: &str) -> Self {
        Self::new(topology(name))
    }

    /// Has the driver be otherwise from now on.
    pub fn change(&mut self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script);
        self.library.play(&self.script).unwrap();
    }

    /// Has the driver report an XID of the first GPU, or of a slice of it. Whoever does not listen yet does not hear it, as
    /// with the real one: one of which nothing follows shows first that somebody does.
    pub fn report(&mut self, daemon: &Daemon, xid: u64, instance: Option<(u32, u32)>) {
        let uuid = gpu(1);
        let next = |s: &Script| s.event.iter().map(|e| e.id).max().unwrap_or(0) + 1;
        let event = |id, data, instance| Event { id, device: uuid.clone(), data, instance, ..Event::default() };
        let counted = || {
            let xids = daemon.get("/v1/node").json()["xids"].clone();
            xids.as_array()
                .unwrap()
                .iter()
                .filter(|x| x["xid"] == 63)
                .map(|x| x["count"].as_u64().unwrap())
                .sum::<u64>()
        };
        let before = counted();
        while counted() == before {
            self.change(|s| s.event.push(event(next(s), 63, None)));
            for _ in 0..100 {
                if counted() > before {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        self.change(|s| s.event.push(event(next(s), xid, instance)));
    }

    /// Has the driver report an XID of the first GPU, whoever listens.
    pub fn report_unheard(&mut self, xid: u64) {
        let id = self.script.event.iter().map(|e| e.id).max().unwrap_or(0) + 1;
        self.change(|s| s.event.push(Event { id, device: gpu(1), data: xid, ..Event::default() }));
    }

    /// Has calls about a device not return for as long as the file that is given back exists.
    pub fn hang(&mut self, device: Option<String>) -> PathBuf {
        let file = self.file("hung");
        std::fs::write(&file, "").unwrap();
        let block = Block { call: EVERY_CALL.into(), device, while_file: file.clone() };
        self.change(|s| s.block.push(block));
        file
    }

    /// A file of the test's own, which does not exist yet.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a daemon on it.
    pub fn start(&self, config: &str) -> Daemon {
        self.start_with("", config)
    }

    /// With more in its table `[gpu]`.
    pub fn start_with(&self, gpu: &str, config: &str) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        super::write_config_on(dir.path(), &format!("backend = \"nvml\"\n{gpu}"), config);
        self.start_in_place(dir)
    }

    /// With the config that lies in the directory.
    pub fn start_in_place(&self, dir: tempfile::TempDir) -> Daemon {
        Daemon::start_as(self.command(), dir)
    }

    /// The binary as it finds the library.
    pub fn command(&self) -> std::process::Command {
        let mut command = super::binary();
        command.env("LD_LIBRARY_PATH", self.library.dir());
        command
    }

    /// A pool of one stub engine that takes `vram` on each of its devices, or nothing.
    pub fn pool(&self, id: &str, devices: &str, vram: Option<&str>, more: &str) -> String {
        let claims = self.library.claims();
        let args = vram.map_or_else(String::new, |size| {
            format!("\"--vram\", \"{size}\", \"--vram-dir\", \"{}\"", claims.display())
        });
        format!(
            "[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\nargs = [{args}]\n\
             devices = \"{devices}\"\nactivation = \"preload\"\n{more}\n"
        )
    }
}

/// One device of `/v1/node`.
pub fn device(daemon: &Daemon, uuid: &str) -> Value {
    let node = daemon.get("/v1/node").json();
    node["devices"].as_array().unwrap().iter().find(|d| d["uuid"] == uuid).cloned().unwrap_or_default()
}

/// The device once it looks as wanted.
pub fn device_when(daemon: &Daemon, uuid: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    super::eventually(|| Some(device(daemon, uuid)).filter(|d| wanted(d)))
}
