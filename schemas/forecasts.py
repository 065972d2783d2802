"""What is coming: load per pool and horizon. Upserts."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from schemas.base import Name, NonNegative, Ratio, Record, Seconds, register


@register
class LoadForecast(Record):
    """Forecast of the mean request rate over the 60 s that end at `target_s`, and how good such forecasts were."""

    kind: ClassVar[str] = "load.forecast"
    pool: Name = Field(description="The pool.")
    horizon_s: float = Field(gt=0, description="How far ahead, s.")
    at_s: Seconds = Field(description="When it was made, Unix s.")
    target_s: Seconds = Field(description="at_s + horizon_s.")
    version: int = Field(ge=0, description="Offset in the pool's partition of pool.signals that this rests on.")
    requests_per_s: NonNegative | None = Field(description="Expected rate, 1/s.")
    requests_per_s_p10: NonNegative | None = Field(description="Lower end of the 80 % interval, 1/s.")
    requests_per_s_p90: NonNegative | None = Field(description="Upper end of the 80 % interval, 1/s.")
    model: str = Field(max_length=200, description="Which expert leads at present.")
    matured: int = Field(ge=0, description="Forecasts of this horizon that could be compared so far.")
    mae: NonNegative | None = Field(description="Mean absolute error of those (half-life 30 min), 1/s.")
    mae_last: NonNegative | None = Field(description="The same for 'as it is now', the yardstick, 1/s.")
    coverage_p90: Ratio | None = Field(description="Share of actual rates at or below their p90.")
    actual_requests_per_s: NonNegative | None = Field(None, description="Rate of the last 60 s, 1/s.")
    was_forecast: NonNegative | None = Field(None, description="What this horizon had said of the last 60 s, 1/s.")
