"""`fleetloop schemas`: the generated JSON Schema, Arrow and AsyncAPI files, and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import EXIT_FAILED, err, guarded, out

app = typer.Typer(
    no_args_is_help=True, help="Write or check the generated schema files (JSON Schema, Arrow, AsyncAPI 3)."
)
Folder = Annotated[Path | None, typer.Option(help="Folder. Default: the package's schemas/generated.")]


@app.command()
def write(folder: Folder = None) -> None:
    """Write the files from the code."""

    def work() -> None:
        from schemas import generate

        target = folder or generate.GENERATED
        generate.write(target)
        out.print(f"written to {target}")

    guarded(work)


@app.command()
def check(folder: Folder = None) -> None:
    """Exit 1 where a file differs from what the code says."""

    def work() -> int:
        from schemas import generate

        differences = generate.check(folder or generate.GENERATED)
        for line in differences:
            err.print(line)
        if differences:
            err.print("run: fleetloop schemas write")
        return EXIT_FAILED if differences else 0

    guarded(work)


@app.command()
def reference(
    file: Annotated[Path | None, typer.Option(help="Write it there. Default: print it.")] = None,
) -> None:
    """Print the reference of commands, settings, objects, topics, records and metrics (Markdown), from the code."""

    def work() -> None:
        from cli.reference import reference as build

        text = build()
        if file is None:
            print(text, end="")
        else:
            file.write_text(text, encoding="utf-8")
            err.print(f"written to {file}")

    guarded(work)
