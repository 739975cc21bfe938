//! What the shim tells its parent.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

/// One line on the shim's stdout. The order is `Started`, `Exited`, `Gone`; or `Failed` alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// The engine's exec succeeded and the start record is written.
    Started {
        /// The engine's main process, which also names its process group.
        pid: u32,
        /// Field 22 of `/proc/<pid>/stat`: clock ticks from boot to its start.
        start_time: u64,
    },
    /// The main process has ended and the exit record is written; descendants may live on.
    Exited {
        /// Its exit code, if it exited.
        code: Option<i32>,
        /// The signal that ended it, if one did.
        signal: Option<i32>,
    },
    /// No descendant is left and the log is complete. The shim exits 0.
    Gone,
    /// The engine was not started, or was killed at once; nothing is left. The shim exits 1.
    Failed {
        /// What failed: `spec`, `program`, `workdir`, `log`, `signals`, `shim`, `lock`, `cgroup`, `memory_limit`, `core_limit`,
        /// `nofile_limit`, `user`, `secret`, `parent_death`, `no_new_privs`, `exec` or `start_record`.
        step: String,
        /// Why, for a person.
        message: String,
        /// The system's error number, if it came from the system.
        errno: Option<i32>,
        /// Whether the thing needed does not exist.
        not_found: bool,
    },
}

impl Report {
    pub(crate) fn failed(step: &str, error: &io::Error) -> Self {
        Self::Failed {
            step: step.to_owned(),
            message: error.to_string(),
            errno: error.raw_os_error(),
            not_found: error.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// The pipe the reports leave by.
pub(crate) struct Reports {
    pipe: Option<File>,
}

impl Reports {
    /// On a close-on-exec duplicate of stdout.
    pub(crate) fn on_stdout() -> Self {
        Self { pipe: io::stdout().as_fd().try_clone_to_owned().ok().map(File::from) }
    }

    /// Sends one report. A reader that has gone is noticed by poll, not here.
    pub(crate) fn send(&mut self, report: &Report) {
        if let (Some(pipe), Ok(mut line)) = (&mut self.pipe, serde_json::to_vec(report)) {
            line.push(b'\n');
            let _gone = pipe.write_all(&line);
        }
    }

    /// Stops watching a pipe that nobody reads.
    pub(crate) fn close(&mut self) {
        self.pipe = None;
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }
}
