"""The command line as a user runs it, in this process."""

from __future__ import annotations

from typing import Any

import pytest

from midstream.cli.main import main


def run_main(capsys: pytest.CaptureFixture[str], status: int) -> tuple[str, str]:
    """Run `sys.argv`; what it wrote to standard output and error, once its exit status is as expected."""
    try:
        main()
        found: Any = 0
    except SystemExit as stop:
        found = stop.code or 0
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err
