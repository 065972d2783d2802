"""Requests level input: one row when a request arrives, one when it ends."""

from __future__ import annotations

from schemas.columns import Column, Columns

REQUEST_ROWS = Columns(
    "request.rows",
    "Requests as a gateway saw them. No prompt, no answer: only sizes and times.",
    [
        Column("event", "text", "arrival, or end.", required=True, choices=("arrival", "end")),
        Column("request_id", "text", "Unique for 15 min; (event, request_id) names the row.", required=True),
        Column("at_s", "f64", "When it happened, Unix time.", "s", required=True),
        Column("pool", "text", "The pool that it was sent to.", required=True, plain=True),
        Column("tenant", "text", "Who is billed. Null: `unknown`."),
        Column("class", "text", "Class of request (intent or tier), e.g. chat. Null: `default`."),
        Column("replica", "text", "The replica that served it.", plain=True),
        Column("status", "text", "How it ended.", choices=("ok", "error", "timeout", "rejected", "cancelled")),
        Column("input_tokens", "f64", "Prompt tokens.", "{token}", high=1e8),
        Column("output_tokens", "f64", "Tokens generated.", "{token}", high=1e8),
        Column("cached_tokens", "f64", "Prompt tokens found in the prefix cache.", "{token}", high=1e8),
        Column("ttft_s", "f64", "Time to first token.", "s", high=1e6),
        Column("tpot_s", "f64", "Mean time per output token after the first.", "s", high=1e6),
        Column("e2e_s", "f64", "End-to-end latency.", "s", high=1e6),
    ],
    {
        "source": "Who sends (gateway, intake).",
        "start_s": "Start of that process, Unix s.",
        "seq": "Number of the batch.",
    },
    json_too=True,
)
