//! Divides a cgroup of version 2 that a service manager has delegated to this process.
//!
//! Only leaves hold processes where controllers are handed down (cgroup-v2.rst, "No Internal Process Constraint"). So the daemon
//! goes into a cgroup of its own, `supervisor`, and those of the engines lie beside it. A unit with `DelegateSubgroup=supervisor`
//! starts it there, which it has to when the engines of an earlier daemon are beside it still.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::cgroup::create_new_or_existing;

/// Where the daemon itself is.
const OWN: &str = "supervisor";
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

/// Makes room for the cgroups of engines: where they are to be made, from the one that this process is in.
pub(crate) fn divide(own: &Path, delegated: impl Fn(&Path) -> bool, pid: u32) -> PathBuf {
    if own.file_name().is_some_and(|name| name == OWN)
        && let Some(above) = own.parent().filter(|above| delegated(above))
    {
        hand_down(above);
        return above.to_owned();
    }
    if delegated(own) {
        match step_aside(own, pid) {
            Ok(()) => hand_down(own),
            Err(error) => tracing::warn!(%error, "the daemon stays in its cgroup: engines get no limits of version 2"),
        }
    }
    own.to_owned()
}

fn step_aside(own: &Path, pid: u32) -> io::Result<()> {
    let aside = own.join(OWN);
    create_new_or_existing(&aside)?;
    fs::write(aside.join("cgroup.procs"), pid.to_string())
}

/// Hands down to those below what there is to hand down. One refusal is no reason not to try the next.
pub(crate) fn hand_down(dir: &Path) {
    let there = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in CONTROLLERS.iter().filter(|c| there.split_whitespace().any(|there| there == **c)) {
        if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")) {
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
        let unit = root.path().join("pool-managerd.service");
        cgroup(&unit, "cpu memory io\n");
        assert_eq!(divide(&unit, |dir| dir == unit, 42), unit);
        assert_eq!(text(&unit.join("supervisor"), "cgroup.procs"), "42");
        assert_eq!(text(&unit, "cgroup.subtree_control"), "+memory");
    }

    #[test]
    fn one_that_was_started_aside_stays_there_and_makes_engines_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("pool-managerd.service");
        let own = unit.join("supervisor");
        cgroup(&unit, "pids\n");
        cgroup(&own, "");
        assert_eq!(divide(&own, |dir| dir == unit, 42), unit);
        assert_eq!(
            (text(&own, "cgroup.procs").as_str(), text(&unit, "cgroup.subtree_control").as_str()),
            ("1\n", "+pids")
        );
    }

    #[test]
    fn what_is_not_delegated_is_left_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        for own in [root.path().join("session.scope"), root.path().join("another/supervisor")] {
            cgroup(&own, "memory pids\n");
            assert_eq!(divide(&own, |_| false, 42), own);
            assert_eq!(text(&own, "cgroup.subtree_control"), "");
            assert!(!own.join("supervisor").exists());
        }
    }

    #[test]
    fn a_cgroup_that_lets_nobody_step_aside_is_used_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("unit");
        cgroup(&unit, "memory\n");
        fs::write(unit.join("supervisor"), "no directory").unwrap();
        assert_eq!(divide(&unit, |_| true, 42), unit);
        assert_eq!(text(&unit, "cgroup.subtree_control"), "", "it holds a process still");
    }
}
