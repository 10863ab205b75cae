"""`midstream eval`: an adapter beside the prompted base model, a plain LoRA and the data's shortcuts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from midstream.cli.common import KV, Adapters, Dtype, Json, Model, Weights, open_engine, print_json, show_progress
from midstream.config import EngineConfig
from midstream.errors import InputError
from midstream.models.source import DEFAULT_MODEL

if TYPE_CHECKING:
    from midstream.session import Engine
    from midstream.types import AdapterInfo

Files = list[Path] | None
_OTHER_ARMS = ("base", "base_constrained", "tfidf", "word_overlap", "last_turn", "reference")


def evaluate(
    name: Annotated[str, typer.Argument(help="Adapter of the library or of --adapters, or its folder.")],
    data: Annotated[list[Path], typer.Option("--data", help="JSON Lines of held-out rows; repeatable.")],
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    compare: Annotated[Files, typer.Option(help="More adapter folders, each an arm under its own name.")] = None,
    train: Annotated[Files, typer.Option(help="Training rows for the shortcuts; default: cross-validated.")] = None,
    corpus: Annotated[Files, typer.Option(help="Passages for retrieval queries; default: beside the data.")] = None,
    conversations: Annotated[Files, typer.Option(help="Conversations of the queries; default: beside them.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Sample of this size.")] = None,
    wrong_documents: Annotated[
        float, typer.Option(help="Share of positive rows repeated with others' passages.", min=0.0, max=1.0)
    ] = 0.0,
    seed: int = 0,
    dtype: Dtype = None,
    weights: Weights = None,
    kv: KV = None,
    png: Annotated[Path | None, typer.Option(help="Write ROC and reliability curves.")] = None,
    card: Annotated[str | None, typer.Option(help="Put the figures into the adapter's card, under this title.")] = None,
    as_json: Json = False,
) -> None:
    """Measure an adapter on held-out rows, each figure with a bootstrap 95 % interval.

    Arms: base (the base model asked in words, its free answer read), base_constrained (held to the same answers),
    alora or lora, the plain LoRA twin NAME-lora where the library has one, and the data's shortcuts.
    """
    from midstream.evaluation.report import check_card, table, update_card, write_picture
    from midstream.evaluation.rows import EvalData, load_rows
    from midstream.evaluation.run import arm_count, task_of
    from midstream.evaluation.run import evaluate as run

    if png is not None and not png.parent.is_dir():
        raise InputError(f"there is no folder {png.parent} for --png")
    files = EvalData(
        tuple(data),
        tuple(train or ()),
        tuple(corpus or ()),
        tuple(conversations or ()),
        max_rows,
        wrong_documents,
        seed,
    )
    config, progress = EngineConfig(kv_dtype=kv), show_progress(as_json)
    with open_engine(
        model, adapters, dtype, weights=weights, config=config, progress=progress, wait_for_kernels=True
    ) as engine:
        arms = _arms(engine, name, compare or [])
        main = next(iter(arms.values()))
        if card is not None:
            check_card(Path(main.path))
        task = task_of(main)
        rows = engine.portal.run(load_rows(engine.aio, task, files))
        bar = Progress(console=Console(stderr=True), disable=not show_progress(as_json))
        with bar:
            job = bar.add_task("answers", total=len(rows.rows) * arm_count(task, arms))
            found = engine.portal.run(run(engine.aio, task, rows, arms, tick=lambda: bar.advance(job)))
    if as_json:
        print_json(found.as_dict())
    else:
        Console().print(table(found))
    if png is not None:
        write_picture(png, found)
    if card is not None:
        update_card(Path(main.path), card, found, "midstream " + shlex.join(sys.argv[1:]))


def _arms(engine: Engine, name: str, compare: list[Path]) -> dict[str, AdapterInfo]:
    """Adapters by the name of their arm: the one asked for by its kind, its twin, and those to compare with."""
    if Path(name, "adapter_config.json").is_file():
        main = engine.load_adapter(name)
    else:
        known = {info.name: info for info in engine.adapters()}
        if name not in known:
            raise InputError(f"no adapter {name!r} for this model (there are: {', '.join(known) or 'none'})")
        main = known[name]
    arms: dict[str, AdapterInfo] = {main.kind: main}
    twin = next((info for info in engine.adapters() if info.name == f"{main.name}-lora"), None)
    if twin is not None and main.kind == "alora":
        arms["lora"] = twin
    for folder in compare:
        arm = folder.resolve().name
        if arm in (*arms, *_OTHER_ARMS):
            raise InputError(f"--compare {folder}: {arm} is another arm's name already; rename the folder")
        # Under a name of its own: an adapter of the same name would take the first one's place.
        arms[arm] = engine.load_adapter(folder, name=f"compared {arm}")
    return arms
