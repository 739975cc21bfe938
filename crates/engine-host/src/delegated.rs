//! Divides a cgroup of version 2 that a service manager has delegated to this process.
//!
//! Only leaves hold processes where controllers are handed down (cgroup-v2.rst, "No Internal Process Constraint"). So the daemon
//! goes into a cgroup of its own, `supervisor`, and those of the engines lie beside it. A unit with `DelegateSubgroup=supervisor`
//! starts it there. It does not step aside in a service by itself: systemd before 254 starts each process of a service in
//! the service's own cgroup, which the kernel refuses with EBUSY once it is divided, so that a daemon that died could not
//! come back while its engines live. A scope is started once.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cgroup::{CONTROL, SUBGROUP, create_new_or_existing};

/// What engines are given, where there is such.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

/// Whether a cgroup was handed over to be divided: it says so, or is owned by a user that is not root.
pub(crate) fn is_delegated(dir: &Path) -> bool {
    let says_so = |name: &str| {
        let mut value = [0; 8];
        rustix::fs::getxattr(dir, name, &mut value[..]).is_ok_and(|length| value.get(..length) == Some(&b"1"[..]))
    };
    let uid = rustix::process::geteuid();
    let owned = || !uid.is_root() && fs::metadata(dir).is_ok_and(|found| found.uid() == uid.as_raw());
    says_so("user.delegate") || says_so("trusted.delegate") || owned()
}

/// Goes from a cgroup that is delegated into one of its own below it, so that it can be divided. Says whether it did.
pub(crate) fn step_aside(own: &Path, delegated: impl Fn(&Path) -> bool, pid: u32) -> bool {
    if own.extension().is_some_and(|kind| kind == "service") || !delegated(own) {
        return false;
    }
    let aside = own.join(SUBGROUP);
    let done = create_new_or_existing(&aside).and_then(|()| fs::write(aside.join("cgroup.procs"), pid.to_string()));
    if let Err(error) = &done {
        tracing::warn!(%error, "the daemon stays in its cgroup: engines get no limits of version 2");
    }
    done.is_ok()
}

/// Hands down to those below what there is to hand down. One refusal is no reason not to try the next.
pub(crate) fn hand_down(dir: &Path) {
    let there = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in CONTROLLERS.iter().filter(|c| there.split_whitespace().any(|there| there == **c)) {
        if let Err(error) = fs::write(dir.join(CONTROL), format!("+{controller}")) {
            tracing::debug!(controller, %error, "a controller is not handed down to engines");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cgroup as a directory of files; what is written last stands in each.
    fn cgroup(dir: &Path, controllers: &str) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in
            [("cgroup.procs", "1\n"), ("cgroup.controllers", controllers), ("cgroup.subtree_control", "")]
        {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    fn text(dir: &Path, name: &str) -> String {
        fs::read_to_string(dir.join(name)).unwrap_or_default()
    }

    #[test]
    fn a_daemon_whose_cgroup_is_delegated_steps_aside_and_hands_down_what_there_is() {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("run-r1.scope");
        cgroup(&unit, "cpu memory io\n");
        assert!(step_aside(&unit, |dir| dir == unit, 42));
        hand_down(&unit);
        assert_eq!(text(&unit.join("supervisor"), "cgroup.procs"), "42");
        assert_eq!(text(&unit, "cgroup.subtree_control"), "+memory");
    }

    #[test]
    fn a_service_that_could_not_be_started_again_is_not_divided() {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("pool-managerd.service");
        cgroup(&unit, "memory\n");
        assert!(!step_aside(&unit, |_| true, 42));
        assert!(!unit.join("supervisor").exists());
    }

    #[test]
    fn what_is_not_delegated_is_left_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("session.scope");
        cgroup(&own, "memory pids\n");
        assert!(!step_aside(&own, |_| false, 42));
        assert_eq!(text(&own, "cgroup.subtree_control"), "");
        assert!(!own.join("supervisor").exists());
    }

    #[test]
    fn a_cgroup_that_lets_nobody_step_aside_is_used_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("unit");
        cgroup(&unit, "memory\n");
        fs::write(unit.join("supervisor"), "no directory").unwrap();
        assert!(!step_aside(&unit, |_| true, 42), "it holds a process still");
    }
}
