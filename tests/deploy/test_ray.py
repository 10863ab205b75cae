"""deploy/ray: it compiles, starts what there is and routes by the header that the backend sends."""

from __future__ import annotations

import ast
import importlib.util
import runpy
import shlex

import pytest

from midstream.remote.affinity import SESSION_HEADER
from tests.deploy.files import DEPLOY
from tests.deploy.test_settings import front_settings

FILE = DEPLOY / "ray" / "serve_replicas.py"
TEXT = FILE.read_text(encoding="utf-8")


def test_its_documentation_names_the_header_and_flags_that_there_are() -> None:
    documentation = ast.get_docstring(ast.parse(TEXT)) or ""
    assert SESSION_HEADER in documentation
    front = next(line for line in documentation.splitlines() if line.strip().startswith("midstream serve --backend"))
    settings = front_settings(shlex.split(front))
    assert settings["backend"] == "http://127.0.0.1:8000"


def test_it_compiles() -> None:
    compile(TEXT, str(FILE), "exec")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'ray[serve]'")
def test_ray_takes_it() -> None:
    from ray.serve._private.constants import SERVE_SESSION_ID

    assert SERVE_SESSION_ID == SESSION_HEADER
    assert runpy.run_path(str(FILE))["Replica"].name == "Replica"
