"""Settings of executors: how long and how often they try, and their bounds. Environment: `FLEETLOOP_EXECUTOR_<NAME>`.

Also names the secrets of every target, so that their variables are known wherever settings are read.
"""

from __future__ import annotations

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import SettingsError
from streams.settings import declare_variable

PREFIX = "FLEETLOOP_EXECUTOR_"
SIMULATOR_TOKEN = "FLEETLOOP_SIMULATOR_TOKEN"
WEBHOOK_SECRET = "FLEETLOOP_WEBHOOK_SECRET"


class ExecutorOptions(BaseSettings):
    """Bounds of an executor. Use `load_options`: it explains what is wrong."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    attempts_max: int = Field(6, ge=1, le=100, description="Attempts at one action.")
    attempt_timeout_s: float = Field(10.0, gt=0, le=600, description="Wall time that one attempt may take, s.")
    deadline_s: float = Field(30.0, gt=0, le=3600, description="Wall time for all attempts at one action, s.")
    backoff_s: float = Field(0.2, gt=0, le=60, description="Wait before the second attempt, s; doubles each time.")
    backoff_s_max: float = Field(5.0, gt=0, le=600, description="Longest wait between two attempts, s.")
    concurrency_max: int = Field(32, ge=1, le=1000, description="Actions at once, each on another target or kind.")
    slots_max: int = Field(20_000, ge=1, description="Targets and kinds whose epoch in force is remembered.")
    answered_max: int = Field(20_000, ge=1, description="Dispatches remembered as taken or answered.")
    stop_within_s: float = Field(5.0, ge=0, le=600, description="Wall time for what is under way at SIGTERM, s.")
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")


def load_options() -> ExecutorOptions:
    """From the environment. Raises SettingsError that names variable, value and remedy."""
    try:
        return ExecutorOptions()
    except ValidationError as error:
        lines = [f"{PREFIX}{str(item['loc'][0]).upper()}: {item['input']!r}: {item['msg']}" for item in error.errors()]
        raise SettingsError("; ".join(lines)) from None


for _name, _field in ExecutorOptions.model_fields.items():
    declare_variable(PREFIX + _name.upper(), f"{_field.description} Default: {_field.default}.")
declare_variable(
    SIMULATOR_TOKEN, "Bearer token that the simulator's control port asks for; without it nothing may act."
)
declare_variable(f"{SIMULATOR_TOKEN}_FILE", "File that holds it, for the executor; wins over the variable.")
declare_variable(WEBHOOK_SECRET, "Secret by which the webhook executor signs what it posts, at least 16 bytes.")
declare_variable(f"{WEBHOOK_SECRET}_FILE", "File that holds it; wins over the variable.")
