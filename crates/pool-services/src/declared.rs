//! Pools as they are declared: who did, in which words, and what stood there before.

use std::sync::Arc;

use pool_domain::rollout::Probation;

use crate::conductor::Made;
use crate::ports::StoredPool;
use crate::spec::PoolSpec;

/// Who declared a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The config file, or whoever embeds this.
    File {
        /// Names the content of its table; another digest is another table.
        digest: String,
    },
    /// Somebody over the API.
    Api,
}

impl Source {
    /// The source as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Api => "api",
        }
    }

    /// The digest of its table, where there is one.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        match self {
            Self::File { digest } => Some(digest),
            Self::Api => None,
        }
    }
}

/// A pool that somebody wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Declared {
    /// What it is to be.
    pub spec: PoolSpec,
    /// The same in its wire form, which says what was left to defaults. Opaque here.
    pub document: String,
    /// Who wants it.
    pub source: Source,
}

/// A declared pool with its history, as an earlier daemon left it.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// The pool.
    pub declared: Declared,
    /// Revision of its spec.
    pub revision: u64,
    /// What it was before the last reload, with its document.
    pub previous: Option<(PoolSpec, String)>,
    /// How long a failure brings that back.
    pub probation: Option<Probation>,
    /// Whether it lies in the ledger; one of the file does only if something was reloaded over its table.
    pub stored: bool,
}

impl From<Declared> for Restored {
    fn from(declared: Declared) -> Self {
        let stored = declared.source == Source::Api;
        Self { declared, revision: 1, previous: None, probation: None, stored }
    }
}

impl From<PoolSpec> for Restored {
    /// One that whoever embeds this gave, with no words for it.
    fn from(spec: PoolSpec) -> Self {
        Declared { spec, document: String::new(), source: Source::File { digest: String::new() } }.into()
    }
}

/// How a pool's spec came about.
#[derive(Debug, Clone)]
pub(crate) struct Standing {
    pub(crate) revision: u64,
    pub(crate) document: String,
    pub(crate) source: Source,
    pub(crate) previous: Option<Made>,
    pub(crate) probation: Option<Probation>,
}

impl Standing {
    pub(crate) fn of(pool: &Restored) -> Self {
        let Restored { declared: Declared { document, source, .. }, revision, previous, probation, stored: _ } =
            pool.clone();
        let previous = previous.map(|(spec, document)| Made { spec: Arc::new(spec), document });
        Self { revision, document, source, previous, probation }
    }

    /// The same as it is written down.
    pub(crate) fn stored(&self, pool: &pool_domain::PoolId) -> StoredPool {
        StoredPool {
            pool: pool.clone(),
            revision: self.revision,
            document: self.document.clone(),
            file_digest: self.source.digest().map(str::to_owned),
            previous: self.previous.as_ref().map(|made| made.document.clone()),
            probation: self.probation.clone(),
        }
    }
}
