"""`midstream models`: the base models that can be asked for by name."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from midstream.cli.common import Json, print_json, show_progress
from midstream.errors import InputError
from midstream.models import source

app = typer.Typer(help="Base models.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Models that can be asked for by name."""
    rows = [
        {
            "name": m.name,
            "description": m.description,
            "licence": m.licence,
            "fetched": source.is_fetched(m.name),
        }
        for m in source.known_models()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("name", "description", "licence", "fetched")
    for row in rows:
        table.add_row(str(row["name"]), str(row["description"]), str(row["licence"]), "yes" if row["fetched"] else "no")
    Console().print(table)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A name of `models list`.")] = source.DEFAULT_MODEL,
    as_json: Json = False,
) -> None:
    """Fetch a model into the user's cache folder, once."""
    known = [m.name for m in source.known_models()]
    if name not in known:
        raise InputError(f"no model {name!r} is known by name: {', '.join(known)}")
    folder = source.resolve(name, progress=show_progress(as_json))
    if as_json:
        print_json({"name": name, "path": str(folder)})
    else:
        typer.echo(f"{name} is in {folder}")
