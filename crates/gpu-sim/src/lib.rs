//! GPUs that exist only in a topology file: the GPU port for development, demos and tests, labelled as simulated
//! wherever it shows.
//!
//! Memory is used by what the file calls `foreign_used` and by the claims that stand-in engines hold in the simulation
//! directory (crate `sim-claims`).

#![forbid(unsafe_code)]

mod topology;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::DeviceSnapshot;
use pool_services::ports::{GpuProbe, Holder, Inventory, Residency};
use sim_claims::HeldClaim;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

pub use crate::topology::TopologyError;

/// The built-in topology, as it would be written by hand.
pub const TWO_GPUS: &str = include_str!("../two-gpus.toml");

/// How often claims are read once [`SimulatedGpus::start`] was called.
pub const REFRESH_EVERY: Duration = Duration::from_millis(200);

/// GPUs from a topology file.
#[derive(Debug)]
pub struct SimulatedGpus {
    shared: Arc<Shared>,
    task: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// The devices as the file has them, with foreign memory alone.
    devices: Vec<DeviceSnapshot>,
    sim_dir: PathBuf,
    inventory: watch::Sender<Inventory>,
}

impl SimulatedGpus {
    /// Devices as a topology file describes them; claims are read from `sim_dir`, which need not exist yet.
    ///
    /// # Errors
    /// When the text is no topology: the error names the line.
    pub fn from_toml(text: &str, sim_dir: PathBuf) -> Result<Self, TopologyError> {
        let devices = topology::parse(text)?;
        let inventory = watch::Sender::new(Inventory::default());
        let this = Self { shared: Arc::new(Shared { devices, sim_dir, inventory }), task: None };
        this.refresh();
        Ok(this)
    }

    /// Two GPUs of 24 and 12 GiB.
    ///
    /// # Errors
    /// Never: the built-in topology is tested.
    pub fn two_gpus(sim_dir: PathBuf) -> Result<Self, TopologyError> {
        Self::from_toml(TWO_GPUS, sim_dir)
    }

    /// Where engines leave their claims.
    #[must_use]
    pub fn sim_dir(&self) -> &Path {
        &self.shared.sim_dir
    }

    /// Reads the claims now and publishes what changed. Blocks for as long as a few small files take.
    pub fn refresh(&self) {
        self.shared.refresh();
    }

    /// Keeps the inventory fresh from now on, until this is dropped. Once is enough; needs a tokio runtime.
    pub fn start(&mut self) {
        if self.task.is_some() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        self.task = Some(tokio::spawn(async move {
            let mut tick = tokio::time::interval(REFRESH_EVERY);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                let shared = Arc::clone(&shared);
                if tokio::task::spawn_blocking(move || shared.refresh()).await.is_err() {
                    return;
                }
            }
        }));
    }
}

impl Drop for SimulatedGpus {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Shared {
    fn refresh(&self) {
        let (claims, problem) = match sim_claims::read_claims(&self.sim_dir) {
            Ok(claims) => (Some(claims), None),
            Err(error) => (None, Some(format!("the claims on simulated memory cannot be read: {error}"))),
        };
        self.inventory.send_if_modified(|current| {
            let devices = match claims {
                Some(claims) => with_claims(&self.devices, &claims),
                None if current.devices.is_empty() => self.devices.clone(),
                None => current.devices.clone(),
            };
            let next = Inventory { simulated: true, devices, problem, ..Inventory::default() };
            let changed = *current != next;
            *current = next;
            changed
        });
    }
}

#[async_trait]
impl GpuProbe for SimulatedGpus {
    fn inventory(&self) -> watch::Receiver<Inventory> {
        self.shared.inventory.subscribe()
    }

    async fn residency(&self) -> Residency {
        let dir = self.shared.sim_dir.clone();
        match tokio::task::spawn_blocking(move || sim_claims::read_claims(&dir)).await {
            Ok(Ok(claims)) => Residency::Simulated(holders(&self.shared.devices, claims)),
            Ok(Err(error)) => Residency::Unknown(format!("the claims on simulated memory cannot be read: {error}")),
            Err(_) => Residency::Unknown("the claims on simulated memory were not read to the end".to_owned()),
        }
    }
}

/// The devices with the memory of these claims used. What is claimed in a slice is used on its parent too.
fn with_claims(devices: &[DeviceSnapshot], claims: &[HeldClaim]) -> Vec<DeviceSnapshot> {
    let sum = |uuid: &str| {
        claims.iter().filter(|c| c.device.eq_ignore_ascii_case(uuid)).fold(0_u64, |sum, c| sum.saturating_add(c.bytes))
    };
    let in_slices = |parent: &str| {
        devices
            .iter()
            .filter(|d| d.mig.as_ref().is_some_and(|m| m.parent == parent))
            .fold(0_u64, |total, d| total.saturating_add(sum(&d.uuid)))
    };
    devices
        .iter()
        .map(|d| {
            let claimed = sum(&d.uuid).saturating_add(in_slices(&d.uuid));
            // A driver never hands out more than there is.
            let vram_used = d.vram_foreign.saturating_add(claimed).min(d.vram_total);
            DeviceSnapshot { vram_used, vram_free: d.vram_total - vram_used, ..d.clone() }
        })
        .collect()
}

fn holders(devices: &[DeviceSnapshot], claims: Vec<HeldClaim>) -> Vec<Holder> {
    claims
        .into_iter()
        .filter_map(|c| {
            let device = devices.iter().find(|d| d.uuid.eq_ignore_ascii_case(&c.device))?;
            Some(Holder { uuid: device.uuid.clone(), pid: c.pid, bytes: c.bytes })
        })
        .collect()
}

#[cfg(test)]
mod tests;
