//! Which pools there are: the only writer of their table. It starts and ends conductors, and writes down what was
//! declared over the API: before a pool exists, and once nothing of it is left.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use pool_domain::PoolId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::change;
use crate::conductor::{Answer, ConductorCommand, Wish};
use crate::control::{ControlError, Operation, OperationState};
use crate::declared::{Declared, Restored, Source, Standing};
use crate::node::Node;
use crate::ports::LedgerError;
use crate::roster::{PoolHandle, Table};

/// Operations of pools that are no more that are remembered.
const REMEMBERED: usize = 32;
/// Between two tries to write down that a pool is no more.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Every pool that is declared while the daemon runs numbers its operations from a multiple of this, so that those of an
/// earlier pool of its name keep theirs.
const A_LIFE: u64 = 1_000_000;

/// On whose behalf a pool is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    File,
    Api,
}

impl Owner {
    fn of(source: &Source) -> Self {
        match source {
            Source::File { .. } => Self::File,
            Source::Api => Self::Api,
        }
    }

    /// Whoever declared a pool changes it.
    fn may_change(self, id: &PoolId, source: &Source) -> Result<(), ControlError> {
        match (self, Self::of(source)) {
            (Self::Api, Self::File) => Err(ControlError::PoolInFile(id.to_string())),
            (Self::File, Self::Api) => {
                let why = format!("there is a pool `{id}` that was declared over the API: remove that one first");
                Err(ControlError::Conflict(why))
            }
            _ => Ok(()),
        }
    }
}

/// What became of a declaration.
#[derive(Debug)]
pub(crate) enum Declaring {
    /// The pool is new.
    New(Operation),
    /// It is there, and is to be changed by its conductor.
    Exists(PoolHandle),
}

/// A change of the table.
#[derive(Debug)]
pub(crate) enum Order {
    Declare {
        declared: Box<Declared>,
        if_match: Option<u64>,
        answer: oneshot::Sender<Result<Declaring, ControlError>>,
    },
    /// Drain a pool and forget it.
    Remove {
        id: PoolId,
        if_match: Option<u64>,
        owner: Owner,
        answer: oneshot::Sender<Answer>,
    },
}

pub(crate) struct Catalog {
    pub(crate) node: Node,
    pub(crate) table: watch::Sender<Table>,
    pub(crate) orders: mpsc::Receiver<Order>,
    /// How pools that are no more went.
    pub(crate) departed: watch::Sender<VecDeque<Operation>>,
    pub(crate) leaving: BTreeSet<PoolId>,
    /// Pools declared so far.
    pub(crate) births: u64,
}

impl Catalog {
    /// Runs until nobody can order anything any more; then no pool is left in the table.
    pub(crate) async fn run(mut self) {
        let mut ends = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                Some(ended) = ends.join_next() => {
                    if let Ok(operation) = ended { self.gone(operation); }
                }
                order = self.orders.recv() => match order {
                    Some(Order::Declare { declared, if_match, answer }) => {
                        let done = self.declare(*declared, if_match).await;
                        // Who asked may be gone.
                        let _ = answer.send(done);
                    }
                    Some(Order::Remove { id, if_match, owner, answer }) => {
                        let begun = self.remove(&id, if_match, owner, &mut ends).await;
                        let _ = answer.send(begun);
                    }
                    None => break,
                },
            }
        }
        self.change(BTreeMap::clear);
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<PoolId, PoolHandle>)) {
        self.table.send_modify(|table| change(Arc::make_mut(table)));
        self.node.bell.notify_one();
    }

    async fn declare(&mut self, declared: Declared, if_match: Option<u64>) -> Result<Declaring, ControlError> {
        let id = declared.spec.id.clone();
        if self.leaving.contains(&id) {
            return Err(ControlError::Conflict(format!("the pool `{id}` is being removed: wait until it is gone")));
        }
        let (table, ports) = (Arc::clone(&self.table.borrow()), &self.node.ports);
        if let Some(handle) = table.get(&id) {
            let standing = Arc::clone(&handle.roster().standing);
            Owner::of(&declared.source).may_change(&id, &standing.source)?;
            change::matching(if_match, standing.revision)?;
            return Ok(Declaring::Exists(handle.clone()));
        }
        if let Some(wanted) = if_match {
            let why = format!("there is no pool `{id}` that could have revision {wanted}: leave the revision out");
            return Err(ControlError::Conflict(why));
        }
        let leaving = |id: &PoolId| self.leaving.contains(id);
        change::clash(&table, leaving, &declared.spec, &declared.source, &*ports.provisioner)?;
        let pool = Restored::from(declared);
        if pool.declared.source == Source::Api {
            // Nothing of an earlier pool of this name counts.
            ports.ledger.forget_pool(&id).await.map_err(unwritten)?;
            ports.ledger.store_pool(&Standing::of(&pool).stored(&id)).await.map_err(unwritten)?;
        }
        self.births += 1;
        let (handle, operation) = self.node.declare(pool, self.births * A_LIFE).await;
        self.change(|pools| {
            pools.insert(id, handle);
        });
        Ok(Declaring::New(operation))
    }

    /// The pool stays in the table until nothing of it is left, here and on the disk.
    async fn remove(
        &mut self,
        id: &PoolId,
        if_match: Option<u64>,
        owner: Owner,
        ends: &mut JoinSet<Operation>,
    ) -> Answer {
        let handle = self.table.borrow().get(id).cloned();
        let Some(handle) = handle else { return Err(ControlError::PoolNotFound(id.to_string())) };
        let standing = Arc::clone(&handle.roster().standing);
        owner.may_change(id, &standing.source)?;
        if self.leaving.contains(id) {
            let facts = handle.facts.borrow();
            let known = facts.operations.iter().find(|o| o.verb == "remove");
            return known.cloned().ok_or_else(stopping);
        }
        change::matching(if_match, standing.revision)?;
        let (answer, answered) = oneshot::channel();
        let command = ConductorCommand { wish: Wish::Remove, answer };
        handle.commands.send(command).await.map_err(|_| stopping())?;
        let operation = answered.await.map_err(|_| stopping())??;
        self.leaving.insert(id.clone());
        let (node, mut facts, mut ended) = (self.node.clone(), handle.facts, operation.clone());
        // A shutdown waits for what has to be written.
        ends.spawn(self.node.memories.track_future(async move {
            while facts.changed().await.is_ok() {}
            if !node.broken.is_cancelled() {
                erase(&node, &ended.pool_id).await;
                ended.state = OperationState::Succeeded("removed".into());
            }
            ended
        }));
        Ok(operation)
    }

    fn gone(&mut self, operation: Operation) {
        let id = operation.pool_id.clone();
        // Told before the pool is missed.
        self.departed.send_modify(|departed| {
            departed.push_front(operation);
            departed.truncate(REMEMBERED);
        });
        self.leaving.remove(&id);
        self.change(|pools| {
            pools.remove(&id);
        });
    }
}

/// The declaration first: what else is known of a pool without one counts for nothing.
async fn erase(node: &Node, id: &PoolId) {
    let ledger = &node.ports.ledger;
    while let Err(error) = ledger.drop_pool(id).await {
        tracing::error!(pool_id = %id, %error, "a pool that was removed would be back after a restart");
        if node.memories.is_closed() {
            return;
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
    if let Err(error) = ledger.forget_pool(id).await {
        tracing::warn!(pool_id = %id, %error, "what was known of a pool that was removed is still written down");
    }
}

fn unwritten(error: LedgerError) -> ControlError {
    ControlError::Unreachable(format!("{error}, so nothing was changed: {}", error.source))
}

fn stopping() -> ControlError {
    ControlError::Unreachable("the pool is stopping".into())
}
