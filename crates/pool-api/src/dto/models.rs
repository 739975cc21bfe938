//! The models there are, in OpenAI's list.

use pool_services::{PoolSnapshot, ReplicaSnapshot};
use serde::{Deserialize, Serialize};

/// One model, as OpenAI lists it, and how its pool is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct ModelView {
    /// What a request names: the pool.
    pub id: String,
    /// `model`
    pub object: String,
    /// Zero: a pool has no age.
    pub created: u64,
    /// `pool-managerd`
    pub owned_by: String,
    /// Other names that a request may give: the model's own, and the pool's aliases.
    pub aliases: Vec<String>,
    /// The pool's state as one word.
    pub state: String,
    /// A request is served without waiting for a start.
    pub ready: bool,
    /// Slots that are free.
    pub slots_free: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Context in tokens over all slots, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u64>,
}

/// The list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct ModelsView {
    /// `list`
    pub object: String,
    /// One for each pool.
    pub data: Vec<ModelView>,
}

impl From<&PoolSnapshot> for ModelView {
    fn from(p: &PoolSnapshot) -> Self {
        let lead = p.lead();
        let free = |r: &ReplicaSnapshot| r.slots_total.saturating_sub(r.active_leases);
        let id = p.pool_id.to_string();
        let names = std::iter::once(&p.model_id).chain(&p.aliases);
        Self {
            aliases: names.filter(|name| **name != id).cloned().collect(),
            id,
            object: "model".into(),
            created: 0,
            owned_by: "pool-managerd".into(),
            state: lead.map(|r| r.state).unwrap_or_default().to_owned(),
            ready: p.ready(),
            slots_free: p.replicas.iter().filter(|r| r.ready).map(free).sum(),
            waiting: p.leases_waiting,
            context: lead.and_then(|r| r.context),
        }
    }
}
