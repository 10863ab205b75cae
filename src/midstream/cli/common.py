"""What several verbs share: loading an engine with its adapters, and reading chat files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from midstream.config import EngineConfig, KVDtype
from midstream.errors import InputError
from midstream.types import Chat

if TYPE_CHECKING:
    from midstream.session import Engine

Model = Annotated[str, typer.Option("--model", "-m", help="Known name, Hugging Face folder or hub id, or GGUF file.")]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapters", "-a", help="Adapter folder, or a folder of them; repeatable."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: what the processor does natively.")
]
Weights = Annotated[
    str | None, typer.Option(help="int8: the model's weights rounded to eight bits; default: as they are.")
]
KV = Annotated[
    KVDtype | None, typer.Option("--kv", help="int8: keys and values rounded to eight bits; default: as computed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def open_engine(
    model: str,
    adapters: list[Path] | None,
    dtype: str | None,
    *,
    weights: str | None = None,
    config: EngineConfig | None = None,
    progress: bool,
    library: bool = True,
    wait_for_kernels: bool = False,
) -> Engine:
    """An engine with the model's library and the given adapter folders loaded.

    `wait_for_kernels`: for what is kept or compared, so that all of it comes from the same kernels.
    """
    # torch and transformers take seconds to import; verbs that do not need them start at once.
    from midstream.session import Engine

    engine = Engine.load(
        model, config=config, dtype=dtype, weights=weights, wait_for_kernels=wait_for_kernels, progress=progress
    )
    try:
        if library:
            engine.load_library()
        for folder in adapters or []:
            for each in adapter_folders(folder):
                engine.load_adapter(each)
    except BaseException:
        engine.close()
        raise
    return engine


def adapter_folders(folder: Path) -> list[Path]:
    """The folder itself if it is an adapter, else the adapters in it. Raises InputError when there are none."""
    if (folder / "adapter_config.json").is_file() or not folder.is_dir():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if not found:
        raise InputError(f"{folder} is no adapter folder and holds none (no adapter_config.json)")
    return found


def read_chat(path: Path) -> Chat:
    """A chat file: {"messages": [{"role", "content"}], "documents": [{"doc_id", "title", "text"}]}; - is stdin."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return Chat.model_validate(json.loads(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat file {path} cannot be read: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise InputError(f"chat file {path}: {wrong}") from error
    except ValueError as error:
        raise InputError(f"chat file {path} is not JSON: {error}") from error


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def show_progress(as_json: bool) -> bool:
    """Progress bars go to standard error, and only where somebody watches."""
    return not as_json and sys.stderr.isatty()
