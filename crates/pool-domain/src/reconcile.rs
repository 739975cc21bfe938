//! What has to be done so that the pools of a file are as the file says now.

use std::collections::BTreeMap;

use crate::PoolId;

/// What is to be done with a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The file has it no more.
    Remove(PoolId),
    /// The file says something else of it.
    Change(PoolId),
    /// The file has it newly.
    Add(PoolId),
    /// The file says the same of it.
    Keep(PoolId),
}

/// Compares what is there with what is wanted, each as names with digests of their tables. What goes is first, because it
/// gives memory back; what is new is last.
#[must_use]
pub fn reconcile(there: &BTreeMap<PoolId, String>, wanted: &BTreeMap<PoolId, String>) -> Vec<Step> {
    let gone = there.keys().filter(|id| !wanted.contains_key(*id)).cloned().map(Step::Remove);
    let (mut stay, mut new) = (Vec::new(), Vec::new());
    for (id, digest) in wanted {
        match there.get(id) {
            None => new.push(Step::Add(id.clone())),
            Some(old) if old == digest => stay.push(Step::Keep(id.clone())),
            Some(_) => stay.push(Step::Change(id.clone())),
        }
    }
    gone.chain(stay).chain(new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_touched() {
        let pools = |all: &[(&str, &str)]| {
            all.iter().map(|(id, digest)| (id.parse().unwrap(), (*digest).to_owned())).collect::<BTreeMap<PoolId, _>>()
        };
        let steps =
            reconcile(&pools(&[("a", "1"), ("b", "1"), ("z", "1")]), &pools(&[("a", "1"), ("b", "2"), ("c", "1")]));
        let id = |text: &str| text.parse().unwrap();
        let expected = [Step::Remove(id("z")), Step::Keep(id("a")), Step::Change(id("b")), Step::Add(id("c"))];
        assert_eq!(steps, expected);
        assert_eq!(reconcile(&pools(&[]), &pools(&[])), []);
    }
}
