//! Reloads in a run: what a daemon starts from, how far they are, and whether they ended in one form or the other.

use std::collections::BTreeSet;
use std::time::Duration;

use pool_domain::PoolId;
use pool_services::control::{Operation, OperationState, PoolControl};
use pool_services::{Declared, PoolManager, PoolSnapshot, Restored};

use super::Plant;
use super::schedule::{Schedule, SimPool};
use super::truth::{Process, Scene, What};
use super::world::World;

/// The pools of a daemon that starts: those of the file, in the form that is written down, and those of the API.
pub(super) fn pools(schedule: &Schedule, world: &World) -> Vec<Restored> {
    let restored = |p: &SimPool| {
        let stored = world.stored(&p.spec.id).filter(|_| p.api || world.plant != Plant::ReloadsForgotten);
        if stored.is_none() && p.api {
            return None;
        }
        let (spec, document) = p.formed(stored.as_ref().map_or("0", |s| &s.document));
        let previous = stored.as_ref().and_then(|s| s.previous.as_ref()).map(|document| p.formed(document));
        let declared = Declared { spec, document, source: p.source() };
        let probation = stored.as_ref().and_then(|s| s.probation.clone());
        let (revision, stored) = (stored.as_ref().map_or(1, |s| s.revision), stored.is_some());
        Some(Restored { declared, revision, previous, probation, stored })
    };
    schedule.pools.iter().filter_map(restored).collect()
}

/// Whether an operation may bring a pool into another form.
fn reloads(o: &Operation) -> bool {
    o.state == OperationState::Running && matches!(o.verb.as_str(), "reload" | "rollback" | "declare")
}

/// Tells which pools are being reloaded, and which no more: once nothing is under way, nor can a failure bring back what
/// was before.
pub(super) fn follow(
    world: &World,
    schedule: &Schedule,
    scene: &Scene,
    operations: &[Operation],
    since: &mut Vec<(PoolId, Duration)>,
) {
    let now = world.now();
    let running: BTreeSet<&PoolId> = operations.iter().filter(|o| reloads(o)).map(|o| &o.pool_id).collect();
    for pool in &schedule.pools {
        let id = &pool.spec.id;
        if running.contains(id) {
            since.retain(|(of, _)| of != id);
            since.push((id.clone(), now));
            if !scene.reloading.contains(id) {
                world.record(What::Reloading(id.clone(), true));
            }
        } else if scene.reloading.contains(id) {
            let last = since.iter().find(|(of, _)| of == id).map(|(_, at)| *at);
            let last = last.unwrap_or_else(|| {
                since.push((id.clone(), now));
                now
            });
            if now > last + pool.spec.reload.probation + Duration::from_secs(1) {
                since.retain(|(of, _)| of != id);
                world.record(What::Reloading(id.clone(), false));
            }
        }
    }
}

/// What is wrong with the forms that pools have in the end, if anything: what is shown, what is written down and what
/// runs are one and the same, and as much of it as there is to be.
pub(super) async fn mixed(m: &PoolManager, schedule: &Schedule, world: &World, scene: &Scene) -> Option<String> {
    let shown: Vec<PoolSnapshot> = m.pools().await.unwrap_or_default();
    let operations = m.operations().await.unwrap_or_default();
    for pool in &schedule.pools {
        let id = &pool.spec.id;
        let stored = world.stored(id);
        // What was told to end does.
        let stays = |p: &&Process| p.launch.key.pool == *id && !p.disowned && p.signalled.is_none();
        let engines: Vec<_> = scene.alive().filter(stays).collect();
        let Some(is) = shown.iter().find(|p| p.pool_id == *id) else {
            if stored.is_some() || !pool.api {
                return Some(format!("{id} is not there, but written down: {stored:?}"));
            }
            if let Some(left) = engines.first() {
                return Some(format!("{id} is not there, but {left:?}"));
            }
            continue;
        };
        let document = m.document(id).await.map(|(_, document)| document).unwrap_or_default();
        let form = pool.form(document.parse().unwrap_or_default());
        if form.model.model_id() != is.model_id {
            return Some(format!("{id} says that it is {document}, and shows {}", is.model_id));
        }
        // Where the way back failed too, which is told, the disk may know better.
        let both = |o: &Operation| {
            o.pool_id == *id && matches!(&o.state, OperationState::Failed(why) if why.contains("so did the way back"))
        };
        let kept = stored.map_or("0".to_owned(), |s| s.document);
        if kept != document && !operations.iter().any(both) {
            return Some(format!("{id} is {document}, and {kept} is written down: {operations:?}"));
        }
        if let Some(other) = engines.iter().find(|p| p.launch.model != is.model_id) {
            return Some(format!("{id} is {}, and there is {other:?}", is.model_id));
        }
        if engines.len() > usize::from(form.replicas) || is.replicas.len() != usize::from(form.replicas) {
            return Some(format!(
                "{id} has {} engines and {} replicas of {}",
                engines.len(),
                is.replicas.len(),
                form.replicas
            ));
        }
    }
    None
}
