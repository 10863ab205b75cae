"""Adapters that the base model's own output may invoke, from what their contracts say."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from midstream.backend import Backend
from midstream.errors import ContractError, InputError
from midstream.intrinsics.call import find
from midstream.intrinsics.render import sampling_params
from midstream.intrinsics.spec import Contract, load_contract
from midstream.transcript import closing
from midstream.types import AdapterInfo, Chat, Invocable, Message

_PROBE = Chat(messages=(Message(role="user", content="a"),))


async def invocables(backend: Backend, names: Sequence[str]) -> tuple[Invocable, ...]:
    """The adapters of these names, ready for `Request.invocable`.

    An invocation that is a plain text (`<certainty>`) is answered where it stands, and the model goes on behind the
    answer. One that is a turn's header (`<|im_start|>certainty`) opens a turn of the adapter's own: behind its answer
    come the end of that turn and the header of a new assistant turn, as the chat template has them. Such a one is
    only reached where the model writes it inside its turn: an end-of-turn token before it ends the output.

    Raises AdapterNotFound, and ContractError for a contract that needs more than the output up to the invocation.
    """
    if not names:
        return ()
    known = {info.name: info for info in await backend.adapters()}
    chosen = [find(known, name) for name in names]
    header = await _header(backend)
    close = (*await closing(backend), *header)
    return tuple(_invocable(info, close if _opens_a_turn(info, header) else ()) for info in chosen)


def _invocable(info: AdapterInfo, close: tuple[int, ...]) -> Invocable:
    contract = load_contract(info)
    reason = _obstacle(contract)
    if reason is not None:
        raise ContractError(f"adapter {info.name} cannot be invoked by the model's own output: its contract {reason}")
    try:
        return Invocable(adapter=info.name, params=sampling_params(contract), closing=close)
    except ValidationError as error:
        reasons = "; ".join(each["msg"] for each in error.errors())
        raise ContractError(f"adapter {info.name} cannot be invoked by the model's own output: {reasons}") from error


def _obstacle(contract: Contract) -> str | None:
    if contract.instruction is not None:
        return "has an instruction, which would have to stand before the invocation"
    if contract.rewrites is not None:
        return f"rewrites its prompt ({contract.rewrites})"
    if contract.transformations:
        return "transforms the answer, which the model has read by then"
    return None


def _opens_a_turn(info: AdapterInfo, header: tuple[int, ...]) -> bool:
    """Whether an invocation begins like the header of the assistant's turn does."""
    return bool(header) and info.invocation_tokens[:1] == header[:1]


async def _header(backend: Backend) -> tuple[int, ...]:
    """What the template puts before an assistant's answer."""
    history, prompt = await backend.tokenize(_PROBE, header=False), await backend.tokenize(_PROBE)
    if prompt[: len(history)] != history:
        raise InputError("the chat template changes the history when it asks for an answer")
    return prompt[len(history) :]
