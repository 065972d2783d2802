"""What it cost: per pool, tenant and window. Upserts."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from schemas.base import Name, NonNegative, Record, Seconds, register


@register
class CostWindow(Record):
    """Cost of one tenant in one pool and window, or of the whole pool (`tenant` null).

    For every window: sum of the tenants' usd_direct + the pool's usd_idle = the pool's usd_total = the bill
    (allocated GPU seconds x price). A tenant's usd_total = usd_direct + its share of idle by direct cost.
    """

    kind: ClassVar[str] = "cost.window"
    pool: Name = Field(description="The pool.")
    tenant: str | None = Field(None, max_length=200, description="Who is billed. Null: the pool as a whole.")
    start_s: Seconds = Field(description="Start of the window, Unix s.")
    size_s: float = Field(gt=0, description="Length of the window, s.")
    version: int = Field(ge=0, description="Offset in the pool's partition of pool.signals that this rests on.")
    closed: bool = Field(description="False: an early look.")
    requests: int = Field(ge=0, description="Requests that ended.")
    input_tokens: NonNegative = Field(description="Prompt tokens of those.")
    output_tokens: NonNegative = Field(description="Tokens generated for those.")
    usd_direct: NonNegative | None = Field(description="Cost of the busy GPU time, USD. Null: price unknown.")
    usd_idle: NonNegative | None = Field(
        description="Cost of allocated but idle GPU time (for a tenant: its share), USD."
    )
    usd_total: NonNegative | None = Field(description="usd_direct + usd_idle, USD.")
    usd_per_million_tokens_direct: NonNegative | None = Field(description="usd_direct per 1M tokens (in + out).")
    usd_per_million_tokens: NonNegative | None = Field(description="usd_total per 1M tokens (in + out).")
    usd_hour_to_date: NonNegative | None = Field(
        None, description="Total of the current UTC hour so far, USD (pool rows only)."
    )
    usd_day_to_date: NonNegative | None = Field(
        None, description="Total of the current UTC day so far, USD (pool rows only)."
    )
    usd_month_to_date: NonNegative | None = Field(
        None, description="Total of the current UTC month so far, USD (pool rows only)."
    )
