"""`midstream adapters`: what adapters there are, what is in one, and whether it fits a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from midstream.cli.common import (
    Adapters,
    Json,
    Model,
    adapter_folders,
    open_engine,
    print_json,
    show_progress,
)
from midstream.errors import AdapterFormatError, InputError
from midstream.models.source import DEFAULT_MODEL

if TYPE_CHECKING:
    from midstream.types import AdapterInfo

app = typer.Typer(help="Adapters.", no_args_is_help=True)


@app.command("list")
def list_adapters(model: Model = DEFAULT_MODEL, adapters: Adapters = None, as_json: Json = False) -> None:
    """Adapters of the library for a base model, and those in the given folders."""
    with open_engine(model, adapters, None, progress=show_progress(as_json)) as engine:
        infos = engine.adapters()
    if as_json:
        print_json([_row(info) for info in infos])
        return
    from midstream.evaluation.catalogue import headline, read_entry

    table = Table("name", "kind", "rank", "MB", "answers", "invocation", "figures")
    for info in infos:
        entry = read_entry(Path(info.path))
        size = f"{info.size_bytes / 1e6:.1f}"
        invocation = repr(info.invocation_text)
        table.add_row(info.name, info.kind, str(info.rank), size, entry.answer, invocation, headline(entry))
    Console().print(table)


@app.command()
def catalogue(folder: Annotated[Path, typer.Argument(help="A folder of adapters.")]) -> None:
    """What a library holds, as Markdown: contracts, invocations, figures with intervals, licences."""
    from midstream.evaluation.catalogue import markdown, read_entries

    entries = read_entries(folder)
    if not entries:
        raise InputError(f"{folder} holds no adapters (no adapter_config.json)")
    typer.echo(markdown(entries))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of an adapter, or its folder.")],
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    as_json: Json = False,
) -> None:
    """All that is known of one adapter."""
    folder = Path(name) if (Path(name) / "adapter_config.json").is_file() else None
    with open_engine(model, adapters, None, progress=show_progress(as_json)) as engine:
        wanted = engine.load_adapter(folder).name if folder else name
        found = [info for info in engine.adapters() if info.name == wanted]
        known = ", ".join(info.name for info in engine.adapters())
    if not found:
        raise InputError(f"no adapter {name!r} for {model} (there are: {known or 'none'})")
    if as_json:
        print_json(_row(found[0]))
        return
    for key, value in _row(found[0]).items():
        typer.echo(f"{key:18} {value}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Adapter folder, or a folder of them.")],
    model: Model = DEFAULT_MODEL,
    as_json: Json = False,
) -> None:
    """Whether adapters can be loaded on a base model; every violation is listed."""
    report: list[dict[str, Any]] = []
    with open_engine(model, None, None, progress=show_progress(as_json), library=False) as engine:
        for each in adapter_folders(folder):
            try:
                report.append({"folder": str(each), "ok": True, **_row(engine.load_adapter(each))})
            except AdapterFormatError as error:
                report.append({"folder": str(each), "ok": False, "violations": list(error.violations)})
    if as_json:
        print_json(report)
    else:
        for entry in report:
            typer.echo(f"{entry['folder']}: {'ok' if entry['ok'] else 'cannot be loaded'}")
            for violation in entry.get("violations", []):
                typer.echo(f"  - {violation}")
    bad = sum(not entry["ok"] for entry in report)
    if bad:
        raise InputError(f"{bad} of {len(report)} adapter folders cannot be loaded")


def _row(info: AdapterInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "kind": info.kind,
        "rank": info.rank,
        "size_bytes": info.size_bytes,
        "invocation_text": info.invocation_text,
        "invocation_tokens": list(info.invocation_tokens),
        "reads": info.metadata.get("reads"),
        "digest": info.digest,
        "path": info.path,
    }
