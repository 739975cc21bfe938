//! The pools at boot: those of the file, and what the ledger says of them and beside them.

use std::collections::BTreeMap;

use pool_api::dto;
use pool_api::spec::Defaults;
use pool_domain::PoolId;
use pool_services::ports::{StateLedger, StoredPool};
use pool_services::{Declared, PoolSpec, Restored, Source};

use crate::config::Config;

/// Puts together what the file declares and what was stored. What was stored and cannot be used is told, and what it was
/// is used in its place, or nothing.
pub(crate) async fn pools(config: &Config, ledger: &dyn StateLedger) -> Vec<Restored> {
    let defaults = config.defaults();
    let stored = ledger.stored_pools().await.into_iter().map(|p| (p.pool.clone(), p));
    let mut stored: BTreeMap<PoolId, StoredPool> = stored.collect();
    let mut pools: Vec<Restored> = Vec::new();
    for declared in &config.pools {
        let id = &declared.spec.id;
        let found = stored.remove(id);
        let pool = match found {
            None => declared.clone().into(),
            Some(p) if p.file_digest.is_none() => {
                tracing::error!(pool_id = %id, "a pool that was declared over the API stands in the config file now, which counts");
                declared.clone().into()
            }
            Some(p) if p.file_digest.as_deref() == declared.source.digest() => {
                restored(&p, declared.source.clone(), &defaults).unwrap_or_else(|| Restored {
                    revision: p.revision,
                    stored: true,
                    ..declared.clone().into()
                })
            }
            Some(p) => {
                tracing::warn!(pool_id = %id, "the config file says something new of a pool that was reloaded: the file counts");
                drop_pool(ledger, id).await;
                Restored { revision: p.revision + 1, ..declared.clone().into() }
            }
        };
        pools.push(pool);
    }
    for (id, p) in stored {
        if p.file_digest.is_some() {
            tracing::warn!(pool_id = %id, "the config file has a pool no more that was reloaded");
            drop_pool(ledger, &id).await;
            continue;
        }
        let Some(pool) = restored(&p, Source::Api, &defaults) else { continue };
        let spec = &pool.declared.spec;
        let clash = pools.iter().find_map(|other| {
            let other = &other.declared.spec;
            spec.clashes_with(other, || (config.external(spec), config.external(other)))
        });
        match clash {
            Some(clash) => {
                tracing::error!(pool_id = %id, %clash, "a pool that was declared over the API is left out");
            }
            None => pools.push(pool),
        }
    }
    pools
}

async fn drop_pool(ledger: &dyn StateLedger, id: &PoolId) {
    if let Err(error) = ledger.drop_pool(id).await {
        tracing::warn!(pool_id = %id, %error, "not written down");
    }
}

fn read(id: &PoolId, document: &str, defaults: &Defaults) -> Result<PoolSpec, String> {
    let keys = dto::keys(document).map_err(|e| e.to_string())?;
    dto::declared(id, keys, defaults).map(|(spec, _)| spec).map_err(|problem| problem.detail)
}

/// A stored pool, checked as if it was declared now; `None`, and a loud word, if it cannot be any more.
fn restored(p: &StoredPool, source: Source, defaults: &Defaults) -> Option<Restored> {
    let spec = match read(&p.pool, &p.document, defaults) {
        Ok(spec) => spec,
        Err(why) => {
            tracing::error!(pool_id = %p.pool, %why, "a stored pool cannot be read any more: it is kept, and not used");
            return None;
        }
    };
    let previous = p.previous.as_ref().and_then(|document| match read(&p.pool, document, defaults) {
        Ok(spec) => Some((spec, document.clone())),
        Err(why) => {
            tracing::warn!(pool_id = %p.pool, %why, "what a pool was before cannot be read any more: there is no way back");
            None
        }
    });
    let declared = Declared { spec, document: p.document.clone(), source };
    let probation = p.probation.clone();
    Some(Restored { declared, revision: p.revision, previous, probation, stored: true })
}
