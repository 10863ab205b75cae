"""From the field `invocable` to the adapters that the base model's output may invoke."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from midstream.backend import Backend
from midstream.flows.invocable import invocables
from midstream.server.params import params_of, wrong
from midstream.server.schemas import Decoding, InvocableBody
from midstream.types import Invocable, SamplingParams

_DEFAULTS = SamplingParams()


async def invocables_of(backend: Backend, asked: Sequence[str | InvocableBody] | None) -> tuple[Invocable, ...]:
    """The adapters in their order. Raises AdapterNotFound, and InputError for what an invoked answer cannot have."""
    bodies = [InvocableBody(adapter=each) if isinstance(each, str) else each for each in asked or ()]
    by_contract = dict.fromkeys(body.adapter for body in bodies if body.params is None)
    ready = {invocable.adapter: invocable for invocable in await invocables(backend, list(by_contract))}
    return tuple(
        _closed(ready[body.adapter], body) if body.params is None else _given(body, body.params) for body in bodies
    )


def _closed(invocable: Invocable, body: InvocableBody) -> Invocable:
    """As the contract says; the caller's own closing goes before the template's."""
    return invocable.model_copy(update={"closing": tuple(body.closing)}) if body.closing else invocable


def _given(body: InvocableBody, decoding: Decoding) -> Invocable:
    max_tokens = decoding.max_tokens or _DEFAULTS.max_tokens
    params = params_of(decoding, _DEFAULTS, max_tokens=max_tokens, logprobs=False, top_logprobs=0)
    try:
        return Invocable(adapter=body.adapter, params=params, closing=tuple(body.closing))
    except ValidationError as error:
        raise wrong(error) from error
