//! The rows: every fault of the project's fault matrix.

/// What stands for an outcome.
pub(super) enum By {
    /// All of these, named as in docs/traceability.md.
    Tests(&'static [&'static str]),
    /// Nothing yet, and why.
    Later(&'static str),
}

/// One fault.
pub(super) struct Row {
    pub(super) fault: &'static str,
    pub(super) outcome: &'static str,
    pub(super) by: By,
}

const fn row(fault: &'static str, outcome: &'static str, tests: &'static [&'static str]) -> Row {
    Row { fault, outcome, by: By::Tests(tests) }
}

const fn later(fault: &'static str, outcome: &'static str, why: &'static str) -> Row {
    Row { fault, outcome, by: By::Later(why) }
}

/// In the order of the matrix.
pub(super) const ROWS: &[Row] = &[
    row(
        "crash loop",
        "waits longer each time, then the breaker opens; one start half-open; a restart of the daemon resets nothing",
        &[
            "pool-services::node::a_crash_loop_backs_off_opens_the_breaker_and_tries_once_half_open",
            "pool-managerd::e2e_durable::a_crash_loop_is_not_reset_by_restarting_the_daemon",
        ],
    ),
    row(
        "crash soon after Ready, again and again",
        "the third opens the breaker",
        &["pool-domain::breaker::three_early_crashes_open_and_sixty_seconds_ready_close"],
    ),
    row(
        "hang: /health says ok, nothing is decoded",
        "found within 45 s, ended, restarted",
        &[
            "pool-services::health::a_hang_while_idle_is_seen_within_45_s",
            "pool-services::health::a_hang_while_busy_is_seen_within_45_s_and_says_what_stood_still",
        ],
    ),
    row(
        "engine stopped by SIGSTOP",
        "a hang: killed with its whole tree, replaced once",
        &["pool-managerd::chaos::a_stopped_engine_is_a_hang_and_is_replaced"],
    ),
    row(
        "slow answers, flapping health",
        "slow is no hang; suspect at the second miss, ended at the third",
        &[
            "pool-services::health::slow_health_within_its_timeout_and_an_engine_that_does_not_say_how_busy_it_is_are_well",
            "pool-domain::lifecycle::suspect_at_the_second_miss_and_ended_at_the_third",
        ],
    ),
    row(
        "killed by the kernel for memory of the host",
        "told from other SIGKILLs by the cgroup's own counter",
        &["engine-host::oom::an_engine_that_the_kernel_killed_for_memory_ran_out_of_host_memory"],
    ),
    row(
        "VRAM runs out",
        "the engine's log tells; its next start waits until more is free than it had, and says what would fit",
        &[
            "engine-host::log_patterns::real_logs_tell_their_class",
            "pool-services::shortage::a_start_that_ran_out_of_memory_waits_until_more_is_free_and_says_what_would_fit",
            "pool-managerd::e2e_nvml_trouble::a_start_that_runs_out_of_memory_waits_until_more_is_free_and_says_what_would_fit",
        ],
    ),
    row(
        "VRAM is not given back",
        "the device is fenced until it is",
        &[
            "pool-services::devices::memory_that_does_not_come_back_fences_its_device_until_it_does",
            "pool-managerd::e2e_nvml::memory_that_does_not_come_back_fences_its_device_until_it_does",
        ],
    ),
    row(
        "VRAM comes back late, and others take of it meanwhile",
        "the next start waits; nothing is promised before it is there",
        &["pool-managerd::e2e_nvml::memory_that_comes_back_late_is_waited_for_and_never_promised_before"],
    ),
    row(
        "XID 79",
        "the engines of the device are ended at once; others go on; reboot the node",
        &[
            "pool-managerd::e2e_nvml::xid_79_ends_the_engines_of_its_gpu_at_once_and_says_what_to_do",
            "pool-services::incidents::engines_of_a_lost_device_are_ended_at_once_whoever_uses_them",
        ],
    ),
    row(
        "XID 94, 13, 31",
        "the engines of the device, or of the slice, start again; the device stays",
        &[
            "pool-managerd::e2e_nvml::xid_94_restarts_the_engines_of_its_gpu_alone",
            "pool-managerd::e2e_nvml::an_xid_of_one_slice_touches_no_other",
            "pool-services::incidents::an_error_of_an_engine_restarts_the_engines_of_its_device_and_no_other",
        ],
    ),
    row(
        "XID 119 and others that need a reset",
        "drained within 10 s, fenced, used again a minute after something shows that it was reset",
        &[
            "pool-services::incidents::a_device_that_has_to_be_reset_is_drained_fenced_and_used_again_when_it_was",
            "pool-managerd::e2e_nvml_trouble::a_device_that_has_to_be_reset_stays_fenced_though_the_daemon_is_killed_and_its_probation_goes_on",
        ],
    ),
    row(
        "NVML blocks",
        "the device is unknown, of the others what is known is old; engines serve, the API answers, starts wait",
        &[
            "pool-managerd::e2e_nvml::while_the_driver_hangs_the_api_answers_engines_serve_and_starts_wait",
            "gpu-nvml::standin::a_call_that_hangs_makes_its_device_unknown_and_all_others_old_until_it_returns",
        ],
    ),
    row(
        "XID 119 while NVML blocks",
        "the engines of that device are drained, others go on; no second call; fenced once the call has returned",
        &["pool-managerd::e2e_nvml_trouble::xid_119_while_the_driver_hangs_costs_the_accused_gpu_alone"],
    ),
    row(
        "an XID that only the kernel's log tells of",
        "heard there, and once where the library tells of it too",
        &[
            "pool-managerd::e2e_nvml_trouble::an_error_that_only_the_kernel_s_log_tells_of_is_heard_and_one_of_both_once",
        ],
    ),
    row(
        "errors of GPU memory (ECC), rows that wait to be remapped, rows that cannot be",
        "drained and fenced; nothing new starts; drained, replace it",
        &[
            "pool-managerd::e2e_nvml::errors_of_its_memory_and_its_driver_s_verdict_drain_a_gpu_or_keep_new_starts_away",
            "pool-services::incidents::rows_that_wait_for_a_reset_keep_new_starts_away_and_rows_that_failed_end_all",
        ],
    ),
    row(
        "driver loaded anew (codes 9 and 18)",
        "engines are left alone, starts wait, found again without a restart of the daemon",
        &["pool-managerd::e2e_nvml::a_driver_that_is_loaded_anew_costs_no_engine_and_starts_wait_for_it"],
    ),
    row(
        "MIG changed under us, handles used again",
        "slices are known by UUID; the engine of one that is gone is ended",
        &[
            "pool-managerd::e2e_nvml::a_slice_that_is_taken_apart_ends_its_engine_and_the_one_in_its_place_is_another",
            "gpu-nvml::standin::slices_are_found_by_uuid_though_their_handles_are_used_again",
        ],
    ),
    row(
        "a GPU leaves without an XID",
        "missed by its UUID: its engines are ended, others go on",
        &[
            "pool-managerd::e2e_nvml::a_gpu_that_leaves_without_a_word_ends_its_engines_and_no_other",
            "pool-services::incidents::one_that_leaves_without_a_word_is_missed_within_six_seconds",
        ],
    ),
    row(
        "`kill -9` of the daemon at every named point, with engines in Starting, Warming, Ready, Draining and Stopping",
        "each engine is taken over as it was, streams go on, nothing starts twice, no stranger is signalled",
        &[
            "pool-managerd::chaos::a_daemon_killed_at_any_point_of_a_start_leaves_every_engine_as_it_was",
            "pool-managerd::chaos::a_daemon_killed_at_any_point_of_a_drain_or_stop_leaves_every_engine_as_it_was",
            "pool-managerd::chaos::a_daemon_killed_at_any_point_of_a_boot_leaves_every_engine_as_it_was",
        ],
    ),
    row(
        "`kill -9` of the daemon at every named point of a reload and of its undo",
        "exactly the old or exactly the new, by whether it was committed; what overlap had not replaced is never touched",
        &[
            "pool-managerd::chaos::a_daemon_killed_at_any_point_of_a_reload_leaves_the_old_or_the_new",
            "pool-managerd::chaos::a_daemon_killed_at_any_point_of_the_undo_of_a_reload_leaves_the_old",
        ],
    ),
    row(
        "any fault at any step of a reload or of its undo",
        "exactly the old or exactly the new; where the way back fails too, both reasons, and the rest is undone",
        &[
            "pool-services::reload_faults::in_place_a_fault_at_any_step_or_undo_ends_in_the_old_or_the_new_or_says_both_reasons",
            "pool-services::reload_faults::with_overlap_a_fault_at_any_step_or_undo_ends_in_the_old_or_the_new_or_says_both_reasons",
            "pool-services::reload_faults::rolling_a_fault_at_any_step_or_undo_ends_in_the_old_or_the_new_or_says_both_reasons",
        ],
    ),
    row(
        "SIGKILL of engine or shim at a named point",
        "replaced once, nothing left",
        &[
            "pool-managerd::chaos::an_engine_or_a_shim_killed_at_any_point_is_replaced_once_and_leaves_nothing",
            "pool-managerd::chaos::a_killed_shim_takes_its_engine_along_and_is_replaced",
        ],
    ),
    row(
        "engine dies while no daemon runs",
        "a crash, with the exit its shim wrote down",
        &["pool-managerd::e2e_adopt::an_engine_that_died_while_no_daemon_ran_has_crashed"],
    ),
    row(
        "pid used again by a stranger",
        "never signalled",
        &["pool-managerd::chaos::a_stranger_that_has_the_pid_of_a_shim_or_an_engine_is_never_signalled"],
    ),
    row(
        "fifty daemons on one state directory",
        "one runs, the others end with 75",
        &["pool-managerd::chaos::of_fifty_daemons_at_once_one_runs_and_the_others_end_with_75"],
    ),
    row(
        "engine forks twice and is deaf to SIGTERM",
        "its whole tree is gone after a stop",
        &["pool-managerd::e2e_stub::an_engine_that_ignores_sigterm_and_forked_twice_is_gone_after_stop"],
    ),
    row(
        "stopped tree is asked to stop",
        "gone",
        &["pool-managerd::chaos::a_stopped_engine_that_is_asked_to_stop_is_gone"],
    ),
    row(
        "cannot be ended (D state)",
        "its device is fenced until proof or `unfence`",
        &["pool-managerd::e2e_durable::a_device_is_fenced_while_something_may_be_left_and_unfence_or_proof_ends_it"],
    ),
    row(
        "a thousand SIGTERMs",
        "one orderly stop, one TERM for the engine",
        &["pool-managerd::chaos::a_thousand_sigterms_are_one_orderly_stop_and_one_term_for_the_engine"],
    ),
    row(
        "disk full",
        "starts wait and say so, neighbours serve on, no generation is lost",
        &["pool-managerd::chaos::a_full_disk_holds_up_starts_and_loses_nothing"],
    ),
    row(
        "torn file, flipped bit",
        "the other copy counts; an engine whose record is damaged is found by its lock",
        &[
            "state-dir::either_file_torn_at_any_byte_loses_no_generation_and_no_hold",
            "state-dir::any_flipped_bit_of_either_file_loses_no_generation_and_no_hold",
            "state-dir::any_flipped_bit_of_an_engines_record_leaves_it_as_it_was_or_unread",
            "pool-managerd::chaos::a_daemon_with_damaged_files_has_each_engine_once",
        ],
    ),
    row(
        "state directory deleted",
        "engines are found by their locks and ended",
        &["pool-managerd::e2e_adopt::a_state_directory_that_was_deleted_leaves_no_engine_behind"],
    ),
    row(
        "power loss",
        "whatever counted as written is there",
        &["state-dir::power::what_counts_as_written_is_there_after_a_power_cut"],
    ),
    row(
        "port taken, or all of them",
        "another one, not counted as a failure; or a wait that says so",
        &[
            "engine-host::engines::a_stolen_port_is_a_port_conflict",
            "pool-managerd::e2e_bad::when_every_engine_port_is_taken_pools_wait_and_say_so",
        ],
    ),
    row(
        "decoy that answers 200 on the engine's port",
        "never taken for the engine",
        &["pool-managerd::chaos::a_decoy_that_takes_the_port_between_choice_and_exec_is_never_taken_for_the_engine"],
    ),
    later(
        "wall clock jumps",
        "nothing decides by it",
        "no test: clippy keeps the wall clock out of every crate that decides",
    ),
    row(
        "lease holder dies",
        "its leases end by their TTL; a late release does nothing",
        &[
            "pool-services::leases::a_lease_ends_with_its_ttl_unless_it_is_renewed_and_its_slot_goes_to_who_waits",
            "pool-managerd::e2e_leases::a_lease_expires_and_its_slot_goes_to_who_waits",
        ],
    ),
    later("suspend of the machine", "TTLs do not count it", "no test: the clock of tokio stands still meanwhile"),
    row("contention for slots", "never over-granted", &["pool-services::admission::many_threads_one_limit"]),
    row(
        "slow clients by the hundred",
        "others are served, and engines watched",
        &["pool-managerd::chaos::slow_clients_by_the_hundred_hold_up_neither_requests_nor_an_engine"],
    ),
    row(
        "no descriptors left",
        "engines run on, the crash is seen, the API answers again",
        &[
            "pool-managerd::chaos::without_descriptors_the_daemon_keeps_its_engines_and_serves_again_when_there_are_some",
        ],
    ),
    row(
        "no process can be made",
        "tried again later, the daemon lives",
        &["pool-managerd::chaos::when_no_process_can_be_made_starts_are_tried_again_and_the_daemon_lives"],
    ),
    row(
        "engine missing or not executable",
        "Failed, nothing is spawned",
        &["pool-managerd::e2e_bad::an_engine_that_is_missing_or_not_executable_is_a_config_failure"],
    ),
    row(
        "log flood",
        "bounded and rotated, also while no daemon runs; blocks nobody",
        &["pool-managerd::chaos::a_flood_of_log_fills_no_disk_blocks_no_engine_and_outlives_the_daemon"],
    ),
    row(
        "reload storm",
        "one after the other, the last wish wins",
        &["pool-services::reload::the_same_spec_again_is_nothing_and_the_last_of_many_wins"],
    ),
    row(
        "rollback that fails too",
        "the pool has failed, with both reasons; others serve on",
        &["pool-services::reload::when_the_way_back_fails_too_the_pool_has_failed_with_both_reasons"],
    ),
];
