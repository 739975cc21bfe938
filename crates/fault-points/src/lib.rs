//! Named points in the course of things, at which a test may interfere.
//!
//! Without the feature `armed`, which only dev-dependencies ask for, a point is nothing at all. What happens at a point is
//! the business of whoever composes the program ([`on_reach`]): those who pass it know of no processes and signals.
#![forbid(unsafe_code)]

use std::sync::OnceLock;

/// Whether this build has points.
pub const ARMED: bool = cfg!(feature = "armed");

static HANDLER: OnceLock<fn(Point)> = OnceLock::new();

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A place in the course of things.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])* $point,)*
        }

        impl Point {
            /// Every point there is.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// What tests call it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$point => $name,)* }
            }
        }
    };
}

points! {
    /// A generation has been chosen, and nobody has written it down.
    BeforeIntent = "before_intent",
    /// It is durable.
    AfterIntent = "after_intent",
    /// So is the record of the engine that is to be.
    AfterRecord = "after_record",
    /// Its port was free; nothing is launched yet.
    BeforeLaunch = "before_launch",
    /// The daemon holds the lock of the replica.
    AfterReplicaLock = "after_replica_lock",
    /// The shim's orders lie there.
    AfterSpecWritten = "after_spec_written",
    /// The shim runs; whether it has started the engine is not known.
    AfterSpawnShim = "after_spawn_shim",
    /// It has.
    AfterStartedReport = "after_started_report",
    /// The driver knows its engine.
    AfterLaunch = "after_launch",
    /// It serves; whether it is the right one is not known.
    BeforeProof = "before_proof",
    /// It has proved it, and that is not written down.
    BeforeReadyRecord = "before_ready_record",
    /// It is.
    AfterReadyRecord = "after_ready_record",
    /// Consumers are about to be told.
    BeforeHandoff = "before_handoff",
    /// They are.
    AfterHandoff = "after_handoff",
    /// Nothing new is admitted, and that is not written down.
    DrainBegun = "drain_begun",
    /// It is.
    AfterDrainRecord = "after_drain_record",
    /// The engine was asked to stop.
    AfterTerm = "after_term",
    /// The engine was killed.
    AfterKill = "after_kill",
    /// It is to stop, and that is not written down.
    BeforeStopRecord = "before_stop_record",
    /// It is.
    AfterStopRecord = "after_stop_record",
    /// Nothing is left of it, as far as the host knows.
    AfterGone = "after_gone",
    /// Its record is about to be struck out.
    BeforeForget = "before_forget",
    /// It has been.
    AfterForget = "after_forget",
    /// A file was written beside the one it is to replace.
    BeforeRename = "before_rename",
    /// It has replaced it; the directory may not know yet.
    AfterRename = "after_rename",
    /// The state directory is this daemon's.
    AfterLock = "after_lock",
    /// A record was read; nobody has looked for its engine.
    BeforeAdopt = "before_adopt",
    /// It was looked for.
    AfterAdopt = "after_adopt",
    /// A driver has taken over what was found.
    AfterTakeOver = "after_take_over",
    /// An engine has proved again what it is.
    AfterAdoptionProof = "after_adoption_proof",
    /// The new form of a pool can run; nothing was touched for it.
    ReloadVerified = "reload_verified",
    /// The old engines of a step of a reload are gone.
    ReloadStopped = "reload_stopped",
    /// What the next start of their replicas makes is the new.
    ReloadChanged = "reload_changed",
    /// New replicas are beside the old.
    ReloadAdded = "reload_added",
    /// The new engines of a step have proved that they serve.
    ReloadStarted = "reload_started",
    /// The new form is about to be written down.
    BeforeCommit = "before_commit",
    /// One of a stored pool's two files is written, and not the one that decides.
    BetweenCopies = "between_copies",
    /// It is durable, and the pool is still the old.
    AfterCommit = "after_commit",
    /// The new ones serve.
    AfterFlip = "after_flip",
    /// The old ones are gone.
    AfterRetire = "after_retire",
    /// A reload has failed; nothing is undone yet.
    UndoBegun = "undo_begun",
    /// That the new form was committed is struck out, as far as the disk takes it.
    UndoneCommit = "undone_commit",
    /// The new engines of a step are gone again.
    UndoneStart = "undone_start",
    /// Their replicas are made from the old again.
    UndoneChange = "undone_change",
    /// The old engines of a step serve again.
    UndoneStop = "undone_stop",
    /// The new replicas are no more.
    UndoneAdd = "undone_add",
}

/// What happens at every point from now on. The first call counts, and in a build without points none does.
pub fn on_reach(handler: fn(Point)) {
    if ARMED {
        // A second one is refused.
        let _first = HANDLER.set(handler);
    }
}

/// Says that the course of things has come here.
#[inline(always)]
pub fn reached(point: Point) {
    if ARMED && let Some(handler) = HANDLER.get() {
        handler(point);
    }
}
