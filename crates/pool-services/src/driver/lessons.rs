//! What a driver learns of its engine's memory: what it took once it was Ready, and that it ran out.

use std::sync::Arc;

use pool_domain::FailureClass;
use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::{Fact, Proof};
use pool_domain::plan::{Demand, EngineMemory, Split};
use pool_domain::residency::{self, Plan};

use super::{Driver, Holds};
use crate::ports::EngineRecord;
use crate::spec::PoolSpec;

impl Driver {
    /// What follows from a proof: whoever holds more than its plan is not Ready, because others were promised the rest.
    pub(super) fn proved(&mut self, proof: Proof, holds: Holds) -> Fact {
        let Holds { on, pids } = holds;
        self.attempt.held.pids = pids;
        let promised = self.promised();
        let alone = promised.first().filter(|_| promised.len() == 1).and_then(|(uuid, _)| on.get(uuid).copied());
        // Who was launched by an earlier daemon is estimated anew by its next start.
        let estimated = self.attempt.demand.as_ref().is_none_or(|demand| is_estimated(demand));
        let plan = if estimated && alone.is_some() { Plan::Learns } else { Plan::Stands };
        let within = residency::within_plan(plan, &promised, &on);
        self.attempt.taken = on;
        if let Err(failure) = within {
            self.attempt.outgrew = alone;
            return Fact::Unproved(failure);
        }
        self.timed(&proof);
        self.learn(alone);
        Fact::Proved(proof)
    }

    /// Bytes by device.
    fn promised(&self) -> Vec<(String, u64)> {
        let of = |r: &EngineRecord| r.devices.uuids.iter().cloned().zip(r.bytes.iter().copied()).collect();
        self.attempt.record.as_ref().map(of).unwrap_or_default()
    }

    /// Remembers what an engine took whose memory was estimated, for its next start; and that it did get along.
    pub(super) fn learn(&mut self, taken: Option<u64>) {
        let Some(before) = self.known() else { return };
        let estimated = self.attempt.demand.as_ref().is_some_and(|demand| is_estimated(demand));
        match taken.filter(|_| estimated) {
            Some(taken) => self.keep_learnt(before.and(taken)),
            None if before.short > 0 => self.keep_learnt(Correction { short: 0, ..before }),
            None => {}
        }
    }

    /// Remembers that it ran out of memory, if that is what it failed of. `served`: it had become Ready.
    pub(super) fn learn_shortage(&mut self, served: bool) {
        let ran_out = |failure: &pool_domain::Failure| failure.class == FailureClass::VramOom;
        if !self.replica.last_failure.as_ref().is_some_and(|(_, failure)| ran_out(failure)) {
            return;
        }
        // It had room enough, beyond what it was promised.
        if let Some(taken) = self.attempt.outgrew.take() {
            return self.learn(Some(taken));
        }
        let (Some(before), Some(grant), Some(demand)) = (self.known(), &self.attempt.grant, &self.attempt.demand)
        else {
            return;
        };
        let (promised, usable) = match (grant.bytes.as_slice(), grant.devices.uuids.as_slice()) {
            ([bytes], [uuid]) if is_estimated(demand) => {
                let inventory = self.ports.gpu.inventory();
                let inventory = inventory.borrow();
                let device = inventory.devices.iter().find(|d| d.uuid == *uuid);
                (Some(*bytes), device.map_or(0, |d| d.vram_total.saturating_sub(d.vram_reserved)))
            }
            _ => (None, 0),
        };
        let room = grant.room.unwrap_or_else(|| grant.bytes.iter().sum());
        self.keep_learnt(before.ran_out(promised, usable, (!served).then_some(room)));
    }

    /// A person says that it may be tried again where it ran out.
    pub(super) fn forget_shortage(&mut self) {
        let Some(known) = self.known().filter(|known| known.short > 0) else { return };
        self.keep_learnt(Correction { short: 0, ..known });
        let demand =
            self.attempt.demand.as_ref().map(|d| Arc::new(Demand { learnt: Some(known.since(0)), ..(**d).clone() }));
        let Some(demand) = demand else { return };
        for want in [&mut self.attempt.want, &mut self.attempt.blocked].into_iter().flatten() {
            want.demand = Arc::clone(&demand);
        }
        self.attempt.demand = Some(demand);
    }

    /// What is known of the engine of this attempt, if nothing then nothing. Unset where it is not known which one it is.
    fn known(&self) -> Option<Correction> {
        let demand = self.attempt.demand.as_ref()?;
        let key = correction_key(&self.spec, demand);
        let newest = self.learnt.as_ref().filter(|(of, _)| *of == key).map(|(_, newest)| *newest);
        Some(newest.or(demand.learnt).unwrap_or_default())
    }

    fn keep_learnt(&mut self, learnt: Correction) {
        let Some(demand) = &self.attempt.demand else { return };
        let key = correction_key(&self.spec, demand);
        self.learnt = Some((key.clone(), learnt));
        let (ledger, pool) = (Arc::clone(&self.ports.ledger), self.key.pool.clone());
        tokio::spawn(async move {
            if let Err(e) = ledger.learn(&pool, &key, learnt).await {
                tracing::warn!(pool_id = %pool, error = %e, "what the engine took is not remembered");
            }
        });
    }
}

/// Whether what such an engine took stands in for an estimate: not where there is none, nor of a split. Without a context
/// of its own the planner chooses one, by what is free.
fn is_estimated(demand: &Demand) -> bool {
    let digest = demand.profile.as_ref().is_some_and(|p| !p.header_digest.is_empty());
    matches!((&demand.memory, &demand.split, demand.vram), (EngineMemory::LlamaCpp(s), Split::Off, None) if s.context != 0)
        && digest
}

/// What was learnt belongs to this engine of the pool: another model or other settings know nothing of it.
pub(crate) fn correction_key(spec: &PoolSpec, demand: &Demand) -> CorrectionKey {
    let (engine, args) = (&spec.engine, &spec.args);
    match (&demand.memory, &demand.profile) {
        (EngineMemory::LlamaCpp(settings), Some(profile)) if is_estimated(demand) => {
            CorrectionKey { model: profile.header_digest.clone(), settings: format!("{engine} {settings:?} {args:?}") }
        }
        (memory, _) => {
            let (vram, split, context, slots) = (demand.vram, &demand.split, spec.context, spec.slots);
            let settings = format!("{engine} {memory:?} {vram:?} {split:?} {context:?} {slots} {args:?}");
            CorrectionKey { model: spec.model.to_string(), settings }
        }
    }
}
