"""`midstream call`: intrinsics on a chat file, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from midstream.cli.common import (
    Adapters,
    Dtype,
    Json,
    Model,
    Weights,
    open_engine,
    print_json,
    read_chat,
    show_progress,
)
from midstream.errors import InputError, MidstreamError
from midstream.models.source import DEFAULT_MODEL

if TYPE_CHECKING:
    from midstream.intrinsics.call import IntrinsicResult


def call(
    names: Annotated[list[str], typer.Argument(help="Intrinsics, in the order of the results.")],
    chat: Annotated[Path, typer.Option("--chat", "-c", help="Chat file (JSON); - reads standard input.")],
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    dtype: Dtype = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Call intrinsics on a conversation: one shared prefix, one batch."""
    conversation = read_chat(chat)
    with open_engine(model, adapters, dtype, weights=weights, progress=show_progress(as_json)) as engine:
        results = engine.call(names, conversation)
    # One that fails leaves the others their results; the exit status and standard error tell of it.
    if as_json:
        print_json([_entry(name, result) for name, result in zip(names, results, strict=True)])
    else:
        Console().print(_table([result for result in results if not isinstance(result, MidstreamError)]))
    _raise_failures(names, results)


def _entry(name: str, result: IntrinsicResult | MidstreamError) -> dict[str, Any]:
    if isinstance(result, MidstreamError):
        return {"intrinsic": name, "error": {"code": result.code, "message": str(result)}}
    return result.as_dict()


def _raise_failures(names: list[str], results: list[IntrinsicResult | MidstreamError]) -> None:
    failed = [(n, r) for n, r in zip(names, results, strict=True) if isinstance(r, MidstreamError)]
    if not failed:
        return
    text = "; ".join(f"{name}: {error}" for name, error in failed)
    kind = InputError if all(isinstance(error, InputError) for _, error in failed) else MidstreamError
    raise kind(text)


def _table(results: list[IntrinsicResult]) -> Table:
    table = Table("intrinsic", "result", "probabilities", "reused", "computed", "forwards", "ms")
    for result in results:
        shares = ", ".join(f"{k} {v:.3f}" for k, v in (result.probabilities or {}).items())
        usage = result.usage
        table.add_row(
            result.intrinsic,
            str(result.result),
            shares,
            str(usage.cached_tokens),
            str(usage.computed_tokens),
            str(usage.forwards),
            f"{result.seconds * 1e3:.0f}",
        )
    return table
