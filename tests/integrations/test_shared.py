"""One definition: what the plugin's distribution carries is midstream's own source."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import midstream_vllm._midstream.activation as carried
import pytest

import midstream
from midstream.adapters import activation
from midstream_vllm import core, shared

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm"


def test_no_copy_is_committed() -> None:
    assert [path.name for path in (PLUGIN / "src" / "midstream_vllm" / "_midstream").glob("*.py")] == ["__init__.py"]


def test_a_distribution_carries_the_source_with_other_imports_only(tmp_path: Path) -> None:
    shared.write(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(shared.MODULES)
    for name, file in shared.MODULES.items():
        original = (Path(midstream.__file__).parent / file).read_text("utf-8").splitlines()
        copied = (tmp_path / f"{name}.py").read_text("utf-8").splitlines()
        changed = [(a, b) for a, b in zip(original, copied, strict=True) if a != b]
        assert all(a.startswith("from midstream.") and b.startswith(f"from {shared.PRIVATE}.") for a, b in changed)


def test_a_wheel_carries_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="needs pip install setuptools")
    # A checkout of its own, for building leaves files behind.
    project = tmp_path / "integrations" / "vllm"
    shutil.copytree(PLUGIN, project)
    (tmp_path / "src").symlink_to(Path(midstream.__file__).parents[1])
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(project)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("midstream_vllm-*.whl")
    with zipfile.ZipFile(wheel) as file:
        for name in shared.MODULES:
            assert file.read(f"midstream_vllm/_midstream/{name}.py").decode() == shared.source(name)
        (points,) = [name for name in file.namelist() if name.endswith("entry_points.txt")]
        assert "[vllm.general_plugins]\nmidstream = midstream_vllm:register" in file.read(points).decode()


def test_in_a_checkout_they_are_read_from_the_source() -> None:
    assert carried.__name__ == f"{shared.PRIVATE}.activation"
    assert carried.find_last([1, 1, 1, 2], [1, 1, 2]) == activation.find_last([1, 1, 1, 2], [1, 1, 2]) == 1
    with pytest.raises(core.InvocationError):
        core.activation_index([1], [2])
    assert core.InvocationError.code == "invocation_missing"


@pytest.mark.parametrize(
    "source",
    ["import midstream.errors", "from midstream.config import X", "from midstream import types", "import midstream"],
)
def test_an_import_that_the_package_lacks_is_found(source: str) -> None:
    with pytest.raises(ValueError, match="does not have"):
        shared.rewritten(source)


def test_the_names_stay_where_the_imports_go() -> None:
    text = shared.rewritten("from midstream.adapters.spec import A\n# midstream.adapters is a name\n")
    assert text == f"from {shared.PRIVATE}.spec import A\n# midstream.adapters is a name\n"
