"""Text Generation Inference's `/metrics`.

Names from its published documentation and source (docs/source/en/reference/metrics.md, router/src/server.rs, 3.x): no
page of a real one was recorded, so this adapter is proved on their form alone.

Not taken: `tgi_request_mean_time_per_token_duration` is inference time divided by generated tokens, prefill included,
and so no time per output token; `tgi_batch_inference_duration{method="prefill"}` is by batch and not by request. There
is no time to first token. What is counted by request moves when it ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from exporters.adapters.base import Adapter, Chosen, Page, Reduce, RowPlan, Series, Values
from exporters.adapters.tables import Table, counter

TABLE = Table(
    sums={
        "running": ("tgi_batch_current_size",),
        "waiting": ("tgi_queue_size",),
        "kv_capacity_tokens": ("tgi_batch_max_total_tokens",),
        "_committed_tokens": ("tgi_batch_current_max_tokens",),
        "prompt_tokens": ("tgi_request_input_length_sum",),
        "generation_tokens": ("tgi_request_generated_tokens_sum",),
        # Tokens beyond the first of a step: those that speculation proposed and that were taken.
        "accepted_tokens": ("tgi_request_skipped_tokens_sum",),
        "requests": counter("tgi_request_success"),
        # A prefill or decode of one batch.
        "iterations": ("tgi_batch_inference_duration_count", *counter("tgi_batch_inference_success")),
        "busy_s": ("tgi_batch_inference_duration_sum",),
    },
    times={"e2e_s": ("tgi_request_duration",), "queue_s": ("tgi_request_queue_duration",)},
    sizes={"input_tokens": ("tgi_request_input_length",), "output_tokens": ("tgi_request_generated_tokens",)},
)
FAILURES = counter("tgi_request_failure")
KINDS = {
    "rejected": ("overloaded", "validation", "template"),
    "aborted": ("dropped",),
    "failed": ("generation", "incomplete"),
}
"""Column -> values of `err`. One that is not listed is a failure."""
LISTED = frozenset(kind for kinds in KINDS.values() for kind in kinds)


class Tgi:
    """The TGI adapter."""

    engine = "tgi"

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a family of TGI is there."""
        return any(name.startswith("tgi_") for name in names)

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """One row; the page does not name the model."""
        page = Page(series)
        columns, histograms = TABLE.fill(page, chosen)
        name = chosen.pick("failures", FAILURES, page.by_name)
        for column, kinds in KINDS.items():
            columns[column] = Reduce(
                tuple(
                    index
                    for index in page.find(name)
                    if (err := page.series[index].labels.get("err", "")) in kinds
                    or (column == "failed" and err not in LISTED)
                )
            )
        columns["start_s"] = page.start()
        return [RowPlan(columns, histograms=histograms, finish=_usage)]


def _usage(values: Values) -> dict[str, float | None]:
    """TGI allocates what a request may grow to when it admits it: that, of all it has."""
    committed, capacity = values.get("_committed_tokens"), values.get("kv_capacity_tokens")
    return {"kv_usage_ratio": committed / capacity if committed is not None and capacity else None}


TGI: Adapter = Tgi()
