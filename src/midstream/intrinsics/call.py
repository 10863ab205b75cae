"""Calling intrinsics: one, or several on one conversation at once (the fan-out)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.backend import Backend
from midstream.errors import AdapterNotFound, MidstreamError
from midstream.history import Parting
from midstream.intrinsics.parse import parse
from midstream.intrinsics.render import Conversation, Tokenizing, render
from midstream.intrinsics.spec import load_contract
from midstream.intrinsics.transform import read_answer, transform
from midstream.types import AdapterInfo, Completion, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IntrinsicResult:
    """What an intrinsic found. `probabilities` are of each label, where the raw answer is one of some labels.

    `result` is what the contract's transformations make of the raw answer. `parting`: where its contract had the
    history rendered anew and the prefix was lost by it, at which token and why. `prefix_rewritten`: what the contract
    changed before the end of the conversation, so that the KV behind it could not be reused.
    """

    intrinsic: str
    result: Any
    probabilities: dict[str | int, float] | None
    usage: Usage
    activation_index: int | None
    seconds: float
    completion: Completion
    parting: Parting | None = None
    prefix_rewritten: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form that programs read. `prefix_rewritten` is there only when it has something to say."""
        rewritten = {} if self.prefix_rewritten is None else {"prefix_rewritten": self.prefix_rewritten}
        return {
            "intrinsic": self.intrinsic,
            "result": self.result,
            "probabilities": self.probabilities and {str(k): share for k, share in self.probabilities.items()},
            "usage": self.usage.as_dict(),
            "activation_index": self.activation_index,
            "seconds": self.seconds,
            **rewritten,
        }


async def call_intrinsic(
    backend: Backend,
    adapter: AdapterInfo,
    conversation: Conversation,
    arguments: Mapping[str, Any] | None = None,
) -> IntrinsicResult:
    """Call one intrinsic. Raises InputError, OutputError, or what the backend raises."""
    return await _call(backend, Tokenizing(backend), adapter, conversation, arguments)


async def _call(
    backend: Backend,
    tokenizing: Tokenizing,
    adapter: AdapterInfo,
    conversation: Conversation,
    arguments: Mapping[str, Any] | None,
) -> IntrinsicResult:
    contract = load_contract(adapter)
    rendered = await render(tokenizing, adapter, contract, conversation, arguments)
    completion = await backend.complete(rendered.request)
    choice = completion.choices[0]
    answer = read_answer(contract, choice.text, choice.logprobs, rendered.tagged)
    raw = parse(answer.text, contract, adapter.name)
    shares = choice.probabilities
    probabilities = None if shares is None else {json.loads(option): share for option, share in shares.items()}
    return IntrinsicResult(
        intrinsic=adapter.name,
        result=transform(raw, contract, answer),
        probabilities=probabilities,
        usage=completion.usage,
        activation_index=completion.activation_index,
        seconds=completion.seconds,
        completion=completion,
        prefix_rewritten=rendered.prefix_rewritten,
    )


async def call_intrinsics(
    backend: Backend,
    names: Sequence[str],
    conversation: Conversation,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[IntrinsicResult | MidstreamError]:
    """Call several intrinsics on one conversation together; one that fails leaves the others their results.

    What one raises that is no MidstreamError is a fault of this program's. It is logged, and named without its text.
    """
    known = {info.name: info for info in await backend.adapters()}
    arguments = arguments or {}
    tokenizing = Tokenizing(backend)

    async def one(name: str) -> IntrinsicResult | MidstreamError:
        try:
            return await _call(backend, tokenizing, find(known, name), conversation, arguments.get(name))
        except MidstreamError as error:
            return error
        except Exception:
            log.exception("intrinsic %s failed", name)
            return MidstreamError(f"intrinsic {name} failed; the log has the reason")

    return await asyncio.gather(*(one(name) for name in names))


def find(known: Mapping[str, AdapterInfo], name: str) -> AdapterInfo:
    """The adapter of that name. Raises AdapterNotFound, which lists what there is."""
    if name not in known:
        raise AdapterNotFound(f"no adapter {name!r} is loaded (loaded: {', '.join(sorted(known)) or 'none'})")
    return known[name]
