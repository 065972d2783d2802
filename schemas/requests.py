"""Requests level input: one row when a request arrives, one when it ends."""

from __future__ import annotations

from schemas.columns import Column, Columns

REQUEST_ROWS = Columns(
    "request.rows",
    "Requests as a gateway saw them. No prompt, no answer: only sizes and times.",
    [
        Column("event", "text", "arrival, or end.", required=True, choices=("arrival", "end")),
        Column(
            "request_id", "text", "Unique for 15 min; (event, request_id, attempt, reporter) names it.", required=True
        ),
        Column("at_s", "f64", "When it happened, Unix time.", "s", required=True),
        Column("pool", "text", "The pool that it was sent to.", required=True, plain=True),
        Column("tenant", "text", "Who is billed. Null: `unknown`."),
        Column("class", "text", "Class of request: its intent (interactive, batch, quality) or tier. Null: `default`."),
        Column("model", "text", "Model that was asked for."),
        Column("priority", "i64", "Priority; higher goes first.", low=-1_000_000, high=1_000_000),
        Column("attempt", "i64", "1: the first attempt, 2: the first retry, ... Null: 1.", low=1, high=1_000),
        Column("reporter", "text", "Who saw it. Null: gateway.", choices=("gateway", "engine")),
        Column("replica", "text", "The replica that served it.", plain=True),
        Column("status", "text", "How it ended.", choices=("ok", "error", "timeout", "rejected", "cancelled")),
        Column("input_tokens", "f64", "Prompt tokens.", "{token}", high=1e8),
        Column("error_type", "text", "Kind of failure, as the reporter names it."),
        Column("output_tokens", "f64", "Tokens generated.", "{token}", high=1e8),
        Column("cached_tokens", "f64", "Prompt tokens found in the prefix cache.", "{token}", high=1e8),
        Column("image_units", "f64", "Images in the input.", "{image}", high=1e6),
        Column("audio_s", "f64", "Audio in the input.", "s", high=1e6),
        Column("video_s", "f64", "Video in the input.", "s", high=1e6),
        Column("queue_s", "f64", "Time in the queue.", "s", high=1e6),
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
