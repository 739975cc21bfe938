//! Another user for the engine, and nothing of what the daemon may do.

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

/// Who an engine runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Further groups. Not looked at if uid and gid are the shim's own: that changes no group.
    #[serde(default)]
    pub groups: Vec<u32>,
}

/// A change of user, made ready before the fork.
pub(crate) struct Change {
    /// Unset for the ids that the shim has already.
    ids: Option<(Uid, Gid, Vec<Gid>)>,
}

impl Change {
    pub(crate) fn to(user: &User) -> Self {
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let ids = || {
            let groups = user.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
            (Uid::from_raw(user.uid), Gid::from_raw(user.gid), groups)
        };
        Self { ids: (own != (user.uid, user.gid)).then(ids) }
    }

    /// For the calling thread, which must be the only one of its process. Makes system calls only.
    pub(crate) fn make(&self) -> Result<(), Errno> {
        empty_bounding_set();
        if let Some((uid, gid, groups)) = &self.ids {
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
        }
        keep_nothing_over_exec()?;
        // Only a change away from root does this by itself.
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, sets)
    }
}

/// So that no program gets what the daemon was given for its own use. Root's own power is another thing.
pub(crate) fn keep_nothing_over_exec() -> Result<(), Errno> {
    match rustix::thread::clear_ambient_capability_set() {
        // A kernel before 4.3 has no such set.
        Err(Errno::INVAL) => Ok(()),
        done => done,
    }
}

/// As far as this is allowed; with `no_new_privs` what is left in it cannot be had either.
fn empty_bounding_set() {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // Unknown to this kernel, and so are all that follow.
        if rustix::thread::capability_is_in_bounding_set(capability).is_err() {
            return;
        }
        let _not_allowed = rustix::thread::remove_capability_from_bounding_set(capability);
    }
}
