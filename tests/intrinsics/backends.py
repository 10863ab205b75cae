"""A Backend that records what it is asked and answers with a fixed text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from midstream.types import (
    AdapterInfo,
    Chat,
    Choice,
    Completion,
    CompletionChoice,
    Delta,
    Request,
    Score,
    TokenLogprob,
    Usage,
)


def adapter(name: str = "check", contract: Mapping[str, Any] | None = None, reads: str = "any") -> AdapterInfo:
    """An adapter with a contract, given as the content of io.yaml."""
    text = None if contract is None else json.dumps(contract)  # JSON is YAML
    return AdapterInfo(name, "alora", "d", f"/{name}", (7, 8), "<c>", 4, 10, contract=text, metadata={"reads": reads})


class Answering:
    """Answers every request with `text`, its tokens, and the shares of a choice's options."""

    def __init__(
        self,
        infos: Sequence[AdapterInfo],
        text: str,
        *,
        tokens: Sequence[TokenLogprob] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.infos, self.text, self.tokens, self.shares = tuple(infos), text, tokens, shares
        self.requests: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        shares = None
        if isinstance(request.params.constraint, Choice) and self.shares is not None:
            shares = dict(self.shares)
        logprobs = tuple(self.tokens or ()) if request.params.logprobs else None
        choice = CompletionChoice(0, self.text, (3,), "stop", logprobs, shares)
        return Completion("r", (choice,), Usage(9, 7, 0, 2, 1, 1), (1,), request.adapter, 7, 0.1)

    def stream(self, request: Request) -> AsyncIterator[Delta]:
        raise NotImplementedError

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        raise NotImplementedError

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        """No token in common, and no invocation."""
        return (1, 2) if isinstance(prompt, str) or prompt.appended else (3,)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return self.infos
