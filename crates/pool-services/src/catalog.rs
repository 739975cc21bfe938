//! Which pools there are: the only writer of their table. It starts and ends conductors.

use std::collections::BTreeMap;
use std::sync::Arc;

use pool_domain::PoolId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::conductor::{ConductorCommand, Wish};
use crate::control::{ControlError, Operation};
use crate::node::Node;
use crate::roster::Table;
use crate::spec::PoolSpec;

type Answer = Result<Operation, ControlError>;

/// A change of the table.
#[derive(Debug)]
pub(crate) enum Order {
    /// A pool that is not there yet.
    Declare { spec: Box<PoolSpec>, answer: oneshot::Sender<Result<(), ControlError>> },
    /// Drain a pool and forget it.
    Remove { id: PoolId, answer: oneshot::Sender<Answer> },
}

pub(crate) struct Catalog {
    pub(crate) node: Node,
    pub(crate) table: watch::Sender<Table>,
    pub(crate) orders: mpsc::Receiver<Order>,
}

impl Catalog {
    /// Runs until nobody can order anything any more; then no pool is left in the table.
    pub(crate) async fn run(mut self) {
        let mut leaving = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                biased;
                Some(ended) = leaving.join_next() => {
                    if let Ok(id) = ended { self.change(|pools| { pools.remove(&id); }); }
                }
                order = self.orders.recv() => match order {
                    Some(Order::Declare { spec, answer }) => {
                        let done = self.declare(*spec).await;
                        // Who asked may be gone.
                        let _ = answer.send(done);
                    }
                    Some(Order::Remove { id, answer }) => {
                        let begun = self.remove(&id, &mut leaving).await;
                        let _ = answer.send(begun);
                    }
                    None => break,
                },
            }
        }
        self.change(BTreeMap::clear);
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<PoolId, crate::roster::PoolHandle>)) {
        self.table.send_modify(|table| change(Arc::make_mut(table)));
        self.node.bell.notify_one();
    }

    async fn declare(&self, spec: PoolSpec) -> Result<(), ControlError> {
        let id = spec.id.clone();
        if self.table.borrow().contains_key(&id) {
            return Err(ControlError::Conflict(format!("there is a pool `{id}` already")));
        }
        let handle = self.node.pool(Arc::new(spec), &mut BTreeMap::new()).await;
        self.change(|pools| {
            pools.insert(id, handle);
        });
        Ok(())
    }

    /// The pool stays in the table until nothing of it is left.
    async fn remove(&self, id: &PoolId, leaving: &mut tokio::task::JoinSet<PoolId>) -> Answer {
        let handle = self.table.borrow().get(id).cloned();
        let Some(handle) = handle else { return Err(ControlError::PoolNotFound(id.to_string())) };
        let (answer, answered) = oneshot::channel();
        let stopping = || ControlError::Unreachable("the pool is stopping".into());
        handle.commands.send(ConductorCommand { wish: Wish::Remove, answer }).await.map_err(|_| stopping())?;
        let operation = answered.await.map_err(|_| stopping())??;
        let (id, mut facts) = (id.clone(), handle.facts);
        leaving.spawn(async move {
            while facts.changed().await.is_ok() {}
            id
        });
        Ok(operation)
    }
}
