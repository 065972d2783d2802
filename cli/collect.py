"""What the reference says is collected from the code itself: counters and metrics from the source, settings from
their classes, commands from their signatures. So it cannot forget one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic_settings import BaseSettings
from typer.models import ArgumentInfo, DefaultPlaceholder, OptionInfo

ROOT = Path(__file__).parents[1]
EDGES = ("agents", "streams", "views", "exporters", "executors", "simulator", "cli")
LEVELS = ("node", "requests", "pool", "fleet")
COUNTER = re.compile(r"[a-z][a-z0-9_<>]*_total")
METRIC = re.compile(r"fleetloop_[a-z0-9_<>]+")
VARIABLE = re.compile(r"FLEETLOOP_[A-Z0-9_]*[A-Z0-9]")
METRIC_CLASSES = {"Counter": "_total", "CounterMetricFamily": "_total", "Gauge": "", "GaugeMetricFamily": ""} | {
    "Histogram": "",
    "HistogramMetricFamily": "",
    "Summary": "",
}
"""Classes of prometheus_client -> what they add to a name that does not end in it."""


class Command(NamedTuple):
    """One command of the command line."""

    name: str
    help: str
    parameters: list[Parameter]


class Parameter(NamedTuple):
    """One argument or option."""

    name: str
    default: str
    help: str
    variable: str


def sources(*packages: str) -> Iterator[tuple[Path, ast.Module]]:
    """Every module of some packages, in the order of their paths."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def text_of(node: ast.AST | None) -> str | None:
    """The text of a literal; of an f-string with its expressions as `<name>`; of anything else None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"<{_name(part.value)}>" if isinstance(part, ast.FormattedValue) else str(typing.cast(Any, part).value)
            for part in node.values
        )
    return None


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "x"


# -- what the folds count --------------------------------------------------------------------------------------


def fold_metrics() -> dict[str, set[str]]:
    """Name that a fold's metrics() may have -> levels (`all`: what every fold has in common)."""
    found: dict[str, set[str]] = {}
    for path, module in sources("models"):
        level = path.relative_to(ROOT / "models").parts[0]
        for name in _counted(module):
            found.setdefault(name, set()).add(level if level in LEVELS else "all")
    return dict(sorted(found.items()))


def _counted(module: ast.Module) -> Iterator[str]:
    parts = {id(part) for node in ast.walk(module) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(module):
        text = None if id(node) in parts else text_of(node)
        if text and COUNTER.fullmatch(text):
            yield text
        if isinstance(node, ast.FunctionDef) and node.name == "metrics":
            yield from _keys(node)


def _keys(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        keys: list[Any] = []
        if isinstance(node, ast.Dict):
            keys = node.keys
        elif isinstance(node, ast.Assign):
            keys = [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
        yield from (text for key in keys if (text := text_of(key)))


# -- what processes expose -------------------------------------------------------------------------------------


def edge_metrics(package: str) -> dict[str, str]:
    """Metric that a package's processes expose under a name written in its source -> its help."""
    found: dict[str, str] = {}
    for _, module in sources(package):
        for node in ast.walk(module):
            pairs: list[tuple[Any, Any, str]] = []
            if isinstance(node, ast.Call) and len(node.args) >= 2 and (_name(node.func) in METRIC_CLASSES):
                pairs = [(node.args[0], node.args[1], METRIC_CLASSES[_name(node.func)])]
            elif isinstance(node, ast.Dict):
                pairs = [(key, value, "") for key, value in zip(node.keys, node.values, strict=True)]
            for key, value, suffix in pairs:
                name, help = text_of(key), text_of(value)
                if name and help and METRIC.fullmatch(name):
                    found[name if name.endswith(suffix) else name + suffix] = help
    return found


# -- settings --------------------------------------------------------------------------------------------------


def settings_classes() -> list[type[BaseSettings]]:
    """Every class of settings of ours; importing their modules also declares what is no field of a class."""
    for path, module in sources(*EDGES):
        declares = {_name(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
        bases = {_name(base) for node in ast.walk(module) if isinstance(node, ast.ClassDef) for base in node.bases}
        if "declare_variable" in declares or "BaseSettings" in bases:
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = {c for c in BaseSettings.__subclasses__() if c.__module__.split(".")[0] in EDGES}
    return sorted(found, key=lambda c: (len(c.model_config["env_prefix"]), c.model_config["env_prefix"]))


# -- commands --------------------------------------------------------------------------------------------------


def commands(app: typer.Typer, path: str = "fleetloop") -> Iterator[Command]:
    """Every command of a typer app and of its groups."""
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__.replace("_", "-")
        yield Command(f"{path} {name}", inspect.getdoc(info.callback) or "", list(_parameters(info.callback)))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        name = group.name if isinstance(group.name, str) else str(group.typer_instance.info.name)
        yield from commands(group.typer_instance, f"{path} {name}")


def _parameters(callback: Any) -> Iterator[Parameter]:
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, info = typing.get_args(hints[name])
        assert isinstance(info, OptionInfo | ArgumentInfo), name
        default = parameter.default
        required = default is inspect.Parameter.empty or isinstance(default, DefaultPlaceholder)
        unset = required or default is None or default is False
        shown = "required" if required else "" if unset else str(getattr(default, "value", default))
        yield Parameter(
            _spelling(name, kind, info, required),
            shown,
            _with_choices(info.help or "", kind),
            info.envvar if isinstance(info.envvar, str) else "",
        )


def _spelling(name: str, kind: Any, info: OptionInfo | ArgumentInfo, required: bool) -> str:
    if isinstance(info, ArgumentInfo):
        return name.upper() if required else f"[{name.upper()}]"
    plain = "--" + name.replace("_", "-")
    # within Annotated the first of the names given stands where the default would
    names = [info.default, *(info.param_decls or ())] if isinstance(info.default, str) else info.param_decls
    if names:
        return ", ".join(names)
    return f"{plain}, --no-{plain[2:]}" if kind is bool else plain


def _with_choices(text: str, kind: Any) -> str:
    for item in (kind, *typing.get_args(kind), *(a for k in typing.get_args(kind) for a in typing.get_args(k))):
        if isinstance(item, type) and issubclass(item, Enum):
            return f"{text} One of {', '.join(str(choice.value) for choice in item)}."
    return text
