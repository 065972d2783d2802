"""What the code has no sentence for: counters of folds, reasons of dead letters, variables outside of settings.

`tests/test_docs.py` asserts that each of these tables has exactly what the code has.
"""

from __future__ import annotations

FOLD_METRICS = {
    "audit_entries_total": "Entries of the audit chain.",
    "commands_refused_total": "Signed commands that may not do what they say: role, expiry, state of the decision.",
    "commands_repeated_total": "Commands that came again and changed nothing.",
    "corrected_rows_total": "Request rows later than the grace, billed as a correction in the current hour.",
    "dead_<reason>_total": "Records or rows refused, by reason of the dead letter.",
    "dead_overflow_total": "... of them, refused because a bound was reached.",
    "decisions_<state>": "Decisions now in this state: pending, approved, dispatched.",
    "decisions_<state>_total": "Decisions that reached this state.",
    "decisions_blocked_total": "Decisions that a constraint blocked.",
    "decisions_forgotten_total": "Ended decisions forgotten because limits.decisions_max was reached.",
    "decisions_remembered": "Decisions held, ended ones included.",
    "dispatches_delayed_total": "Dispatches that waited because of limits.actions_per_minute_max.",
    "duplicate_batches_total": "Node batches that came again.",
    "duplicate_replicas_total": "Replicas that an inventory names twice.",
    "duplicate_rows_total": "Request rows that came again with the same content.",
    "duplicate_samples_total": "Samples that came again.",
    "engine_samples": "Samples of engines held within the grace.",
    "findings_overflow_total": "Findings left out because too many are open in a pool.",
    "gpu_samples": "Samples of GPUs held within the grace.",
    "inventory_outdated_total": "Inventories that a newer one had already replaced.",
    "late_rows_total": "Rows that came after the grace.",
    "nodes": "Nodes known.",
    "open_decisions_overflow_total": "Proposals blocked because limits.open_decisions_max was reached.",
    "overflow_batches_total": "Batch ids forgotten early because limits.node_batches_max was reached.",
    "overflow_gpus_total": "Rows of GPUs beyond limits.gpus_per_node_max.",
    "overflow_nodes_total": "Records of nodes beyond limits.nodes_max.",
    "overflow_pools_total": "Rows of pools beyond limits.pools_max.",
    "overflow_replicas_total": "Rows of replicas beyond limits.replicas_max.",
    "overflow_request_ids_total": "Request ids forgotten early because limits.request_ids_max was reached.",
    "overflow_samples_total": "Samples refused because limits.node_samples_max was reached.",
    "overflow_segments_total": "States of replicas beyond limits.node_segments_max.",
    "overflow_tenants_total": "Rows counted under tenant `(other)` because limits.tenants_max was reached.",
    "paused": "Pauses in force.",
    "pools": "Pools known.",
    "pools_overflow_total": "Records of pools beyond limits.pools_max.",
    "proposals_<kind>_total": "Proposals made, by kind of action.",
    "proposals_lost_total": "Proposals that the fleet level never answered; made again.",
    "proposals_repeated_total": "Proposals that came again and changed nothing.",
    "replicas": "Replicas known.",
    "request_ids": "Request ids held for deduplication.",
    "request_windows": "Windows held within the grace.",
    "results_dry_total": "Results of executors in dry-run.",
    "results_foreign_total": "Results of another executor, or of an earlier dispatch, than the decision waits for.",
    "results_late_total": "Results of a decision that is not, or no longer, dispatched.",
    "samples_total": "Samples taken.",
    "specs_overflow_total": "Objects of pools and prices beyond limits.pools_max.",
    "status_older_total": "Pool states that a newer one had already replaced.",
    "targets_resynced_total": "Targets taken anew from what is allocated, because no order explains it.",
    "verdicts_ignored_total": "Verdicts over decisions that are not known or not executed.",
    "verdicts_<verdict>_total": "Verdicts over executed decisions: verified, regressed.",
    "windows_dropped_total": "Windows of a pool dropped because too many were held.",
    "windows_too_old_total": "Windows older than what a pool still holds.",
}
"""Name after fleetloop_fold_ -> meaning."""

REASONS = {
    "undecodable": "It is not what its content type says.",
    "invalid": "A field is missing, of a wrong type, or not one of its choices.",
    "not_finite": "NaN or infinity: send null for unknown.",
    "out_of_bounds": "A number outside of its bounds, e.g. a negative counter.",
    "time_unit": "Milliseconds where seconds are wanted.",
    "in_future": "Ahead of log time by more than limits.future_s.",
    "too_late": "Later than the log's grace.",
    "unknown_type": "A ce_type that this topic does not carry.",
    "unknown_version": "A major version that this release does not read.",
    "conflict": "An id that is known with other content: the first wins.",
    "overflow": "A bound was reached; the remedy names its setting.",
    "unsigned": "A command without a signature of a configured signer.",
    "fold_error": "Our fold raised on it; the traceback is in `detail`. Please report it.",
    "too_large": "More rows or bytes than a record may have.",
}
"""Reason of a dead letter -> meaning."""

VARIABLES = {
    "FLEETLOOP_PARENT_PID": "Set by the supervisor for its children, which end with it. Not for you to set.",
    "FLEETLOOP_REQUIRE_BROKER": "1 (the default of `make test`): a broker test that would be skipped fails.",
    "FLEETLOOP_SPEED": "docker-compose.yml alone: the deployment's speed.",
}
"""Variables that no process reads as a setting -> meaning."""
