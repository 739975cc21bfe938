//! What is known of pools, as a plain value with the names the project began with. An embedder may own one for engines
//! it runs itself; a managed pool is described by [`crate::PoolSnapshot`] instead, and is ready only with a proof.

use std::collections::BTreeMap;

use pool_domain::perf::PerfHints;
use pool_domain::{DeviceSnapshot, HealthStatus};

use crate::ports::Handoff;
use crate::snapshot::PoolSnapshot;

/// One pool.
#[derive(Debug, Clone, PartialEq, Default)]
struct Entry {
    health: HealthStatus,
    last_heartbeat_ms: Option<u64>,
    last_error: Option<String>,
    version: Option<String>,
    active_leases: i32,
    slots_total: Option<i32>,
    engine_version: Option<String>,
    engine_digest: Option<String>,
    engine_catalog_id: Option<String>,
    device_mask: Option<String>,
    draining: bool,
    room: Option<Room>,
    perf: PerfHints,
}

/// The memory of a pool's devices, all of them together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Room {
    total: u64,
    free: u64,
    /// The least of them, where known of all.
    compute_capability: Option<(u32, u32)>,
}

/// One pool as placement sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct RegistrySnapshot {
    /// Pool.
    pub pool_id: String,
    /// Live and ready.
    pub health: HealthStatus,
    /// Engine version.
    pub engine_version: Option<String>,
    /// Device mask.
    pub device_mask: Option<String>,
    /// Slots.
    pub slots_total: Option<i32>,
    /// Slots not leased.
    pub slots_free: Option<i32>,
    /// Leases held.
    pub active_leases: i32,
    /// Leases are refused.
    pub draining: bool,
    /// All memory of its devices.
    pub vram_total_bytes: Option<u64>,
    /// Of this, free.
    pub vram_free_bytes: Option<u64>,
    /// CUDA compute capability of its least device.
    pub compute_capability: Option<(u32, u32)>,
    /// How fast it is.
    pub perf: PerfHints,
}

/// Pools by name.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    pools: BTreeMap<String, Entry>,
}

macro_rules! fields {
    ($($(#[$doc:meta])* $get:ident, $set:ident, $field:ident: $ty:ty;)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $get(&self, pool_id: &str) -> Option<$ty> {
            self.pools.get(pool_id).and_then(|e| e.$field.clone())
        }

        /// Sets it; an unknown pool is registered.
        pub fn $set(&mut self, pool_id: &str, value: impl Into<$ty>) {
            self.entry(pool_id).$field = Some(value.into());
        }
    )*};
}

impl Registry {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn entry(&mut self, pool_id: &str) -> &mut Entry {
        self.pools.entry(pool_id.to_owned()).or_default()
    }

    fields! {
        /// When it was last heard of, in milliseconds.
        get_heartbeat, set_heartbeat, last_heartbeat_ms: u64;
        /// What went wrong last.
        get_last_error, set_last_error, last_error: String;
        /// Version of the pool's software.
        get_version, set_version, version: String;
        /// Engine version.
        get_engine_version, set_engine_version, engine_version: String;
        /// Engine digest.
        get_engine_digest, set_engine_digest, engine_digest: String;
        /// Engine catalogue id.
        get_engine_catalog_id, set_engine_catalog_id, engine_catalog_id: String;
        /// Device mask.
        get_device_mask, set_device_mask, device_mask: String;
    }

    /// Registers a pool; says whether it was new.
    pub fn register(&mut self, pool_id: &str) -> bool {
        let new = !self.pools.contains_key(pool_id);
        self.entry(pool_id);
        new
    }

    /// Forgets a pool; says whether it was known.
    pub fn deregister(&mut self, pool_id: &str) -> bool {
        self.pools.remove(pool_id).is_some()
    }

    /// Live and ready.
    #[must_use]
    pub fn get_health(&self, pool_id: &str) -> Option<HealthStatus> {
        self.pools.get(pool_id).map(|e| e.health)
    }

    /// Sets live and ready.
    pub fn set_health(&mut self, pool_id: &str, health: HealthStatus) {
        self.entry(pool_id).health = health;
    }

    /// Sets what is known of the engine at once; what is `None` stays as it was.
    pub fn set_engine_meta(
        &mut self,
        pool_id: &str,
        version: Option<&str>,
        digest: Option<&str>,
        catalog_id: Option<&str>,
    ) {
        let e = self.entry(pool_id);
        for (field, value) in
            [(&mut e.engine_version, version), (&mut e.engine_digest, digest), (&mut e.engine_catalog_id, catalog_id)]
        {
            if let Some(v) = value {
                *field = Some(v.to_owned());
            }
        }
    }

    /// How fast it is.
    #[must_use]
    pub fn get_perf(&self, pool_id: &str) -> Option<PerfHints> {
        self.pools.get(pool_id).map(|e| e.perf)
    }

    /// Sets how fast it is.
    pub fn set_perf(&mut self, pool_id: &str, perf: PerfHints) {
        self.entry(pool_id).perf = perf;
    }

    /// Takes over what the devices say, for every pool whose mask names them all by UUID. Of another pool nothing is known.
    pub fn update_devices(&mut self, devices: &[DeviceSnapshot]) {
        for entry in self.pools.values_mut() {
            entry.room = entry.device_mask.as_deref().and_then(|mask| room(mask, devices));
        }
    }

    /// Slots.
    #[must_use]
    pub fn get_slots_total(&self, pool_id: &str) -> Option<i32> {
        self.pools.get(pool_id).and_then(|e| e.slots_total)
    }

    /// Sets the slots, at least 0.
    pub fn set_slots_total(&mut self, pool_id: &str, slots: i32) {
        self.entry(pool_id).slots_total = Some(slots.max(0));
    }

    /// Whether leases are refused.
    #[must_use]
    pub fn get_draining(&self, pool_id: &str) -> bool {
        self.pools.get(pool_id).is_some_and(|e| e.draining)
    }

    /// Refuses or grants leases from now on.
    pub fn set_draining(&mut self, pool_id: &str, draining: bool) {
        self.entry(pool_id).draining = draining;
    }

    /// Leases held; 0 for an unknown pool.
    #[must_use]
    pub fn get_active_leases(&self, pool_id: &str) -> i32 {
        self.pools.get(pool_id).map_or(0, |e| e.active_leases)
    }

    /// Takes a lease unless the pool is unknown, draining or out of slots; returns the leases then held.
    pub fn allocate_lease(&mut self, pool_id: &str) -> i32 {
        let Some(e) = self.pools.get_mut(pool_id) else { return 0 };
        if !e.draining && e.slots_total.is_none_or(|s| e.active_leases < s) {
            e.active_leases = e.active_leases.saturating_add(1);
        }
        e.active_leases
    }

    /// Gives a lease back; never below 0. Returns the leases then held.
    pub fn release_lease(&mut self, pool_id: &str) -> i32 {
        let Some(e) = self.pools.get_mut(pool_id) else { return 0 };
        e.active_leases = (e.active_leases - 1).max(0);
        e.active_leases
    }

    /// Takes over what a Ready engine told: clears the last error, sets the heartbeat, clamps the slots.
    pub fn register_ready_from_handoff(&mut self, handoff: &Handoff, now_ms: u64) {
        let e = self.entry(handoff.key.pool.as_str());
        e.health = HealthStatus { live: true, ready: true, ..HealthStatus::default() };
        e.last_error = None;
        e.last_heartbeat_ms = Some(now_ms);
        e.engine_version = Some(handoff.engine_version.clone());
        e.device_mask = Some(handoff.device_mask.clone());
        e.slots_total = Some(i32::from(handoff.slots).max(1));
        e.draining = false;
    }

    /// Takes over the picture of a managed pool, error included.
    pub fn update(&mut self, pool: &PoolSnapshot) {
        let (live, ready, draining) = (pool.live(), pool.ready(), pool.draining() || pool.hold);
        let slots: u32 = pool.replicas.iter().map(|r| r.slots_total).sum();
        let leases: u32 = pool.replicas.iter().map(|r| r.active_leases).sum();
        let error = pool.last_error().map(|e| e.detail.clone());
        let (version, mask) =
            pool.lead().map(|r| (r.engine_version.clone(), r.device_mask.clone())).unwrap_or_default();
        let e = self.entry(pool.pool_id.as_str());
        let consecutive_failures = pool.lead().map_or(0, |r| r.consecutive_failures);
        e.health = HealthStatus { live, ready, consecutive_failures, ..HealthStatus::default() };
        e.draining = draining;
        e.slots_total = Some(i32::try_from(slots).unwrap_or(i32::MAX));
        e.active_leases = i32::try_from(leases).unwrap_or(i32::MAX);
        e.last_error = error;
        e.engine_version = Some(version);
        e.device_mask = Some(mask);
        e.perf = pool.lead().map(|r| r.perf).unwrap_or_default();
    }

    /// Every pool, for placement.
    #[must_use]
    pub fn snapshots(&self) -> Vec<RegistrySnapshot> {
        self.pools
            .iter()
            .map(|(id, e)| RegistrySnapshot {
                pool_id: id.clone(),
                health: e.health,
                engine_version: e.engine_version.clone(),
                device_mask: e.device_mask.clone(),
                slots_total: e.slots_total,
                slots_free: e.slots_total.map(|s| (s - e.active_leases).max(0)),
                active_leases: e.active_leases,
                draining: e.draining,
                vram_total_bytes: e.room.map(|r| r.total),
                vram_free_bytes: e.room.map(|r| r.free),
                compute_capability: e.room.and_then(|r| r.compute_capability),
                perf: e.perf,
            })
            .collect()
    }
}

fn room(mask: &str, devices: &[DeviceSnapshot]) -> Option<Room> {
    let named = mask.split(',').map(|uuid| devices.iter().find(|d| d.uuid == uuid)).collect::<Option<Vec<_>>>()?;
    Some(Room {
        total: named.iter().map(|d| d.vram_total).sum(),
        free: named.iter().map(|d| d.vram_free).sum(),
        compute_capability: named.iter().map(|d| d.compute_capability).min().flatten(),
    })
}

#[cfg(test)]
mod tests {
    use pool_domain::{Generation, ReplicaId, ReplicaKey};

    use super::*;

    fn handoff(slots: u16) -> Handoff {
        Handoff {
            key: ReplicaKey { pool: "p".parse().unwrap(), replica: ReplicaId(0) },
            generation: Generation(1),
            endpoint: "http://127.0.0.1:1".into(),
            api_key: None,
            engine: "stub".into(),
            engine_version: "1".into(),
            model: "m".into(),
            device_mask: "GPU-x".into(),
            slots,
            vram: 0,
        }
    }

    #[test]
    fn leases_are_never_negative_and_zero_for_unknown_pools() {
        let mut r = Registry::new();
        assert_eq!((r.allocate_lease("nope"), r.release_lease("nope"), r.get_active_leases("nope")), (0, 0, 0));
        r.register("p");
        assert_eq!(
            (r.release_lease("p"), r.allocate_lease("p"), r.release_lease("p"), r.release_lease("p")),
            (0, 1, 0, 0)
        );
    }

    #[test]
    fn a_draining_pool_grants_no_lease() {
        let mut r = Registry::new();
        r.register("p");
        r.allocate_lease("p");
        r.set_draining("p", true);
        assert_eq!(r.allocate_lease("p"), 1);
        assert!(r.snapshots()[0].draining);
    }

    #[test]
    fn a_handoff_makes_ready_clears_the_error_and_clamps_slots() {
        let mut r = Registry::new();
        r.set_last_error("p", "broken");
        r.set_draining("p", true);
        r.register_ready_from_handoff(&handoff(0), 42);
        assert!(r.get_health("p").unwrap().ready);
        assert_eq!((r.get_last_error("p"), r.get_heartbeat("p"), r.get_slots_total("p")), (None, Some(42), Some(1)));
        assert_eq!((r.allocate_lease("p"), r.allocate_lease("p")), (1, 1), "never above the slots");
    }

    #[test]
    fn engine_meta_is_kept_where_not_given() {
        let mut r = Registry::new();
        r.set_engine_meta("p", Some("1"), Some("sha"), None);
        r.set_engine_meta("p", Some("2"), None, Some("cat"));
        assert_eq!(
            (r.get_engine_version("p"), r.get_engine_digest("p"), r.get_engine_catalog_id("p")),
            (Some("2".into()), Some("sha".into()), Some("cat".into()))
        );
        assert!(r.deregister("p") && !r.deregister("p"));
    }
}
