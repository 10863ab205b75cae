"""An answer that a flow draws: in the making, and as it stands in a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from midstream.backend import Backend
from midstream.errors import MidstreamError
from midstream.flows.answer import followed
from midstream.flows.events import error_dict
from midstream.flows.run import Run, spent
from midstream.flows.seeds import derive
from midstream.transcript import Transcript
from midstream.types import Completion, Delta, FinishReason, Request, SamplingParams


def _drawable(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise ValueError(f"a flow draws each answer with its own seed: n is {params.n}, and must be 1")
    if params.seed is not None:
        raise ValueError("the seeds of a flow's answers come from its run: give Run a seed, and params none")
    return params


DrawnParams = Annotated[SamplingParams, AfterValidator(_drawable)]
"""How a flow's answers are sampled: one at a time, each with a seed that the flow derives."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An answer of the base model. One that was stopped has no `finish_reason` and no `transcript`.

    `transcript` is the conversation with it. `error`: what failed while it was drawn or judged. `generating_tokens`
    and `judging_tokens` were computed for it: prompt positions and output; a prompt that several answers share is
    counted at those that computed it.
    """

    index: int
    seed: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    transcript: Transcript | None
    error: MidstreamError | None
    generating_tokens: int
    judging_tokens: int

    @property
    def tokens_spent(self) -> int:
        return self.generating_tokens + self.judging_tokens

    def as_dict(self) -> dict[str, Any]:
        """The form that programs read, without token ids; subclasses add what is theirs."""
        return {
            "index": self.index,
            "seed": self.seed,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "error": None if self.error is None else error_dict(self.error),
            "generating_tokens": self.generating_tokens,
            "judging_tokens": self.judging_tokens,
        }


class Draft:
    """Answer number `index` of a run, with what there is of it so far. `heard` is given its text as it comes."""

    def __init__(self, run: Run, index: int, *, heard: Callable[[str], None] | None = None) -> None:
        self.index = index
        self.seed = derive(run.seed, index)
        self.text = ""
        self.transcript: Transcript | None = None
        self.error: MidstreamError | None = None
        self._run = run
        self._heard = heard
        self._tokens: list[int] = []
        self._completion: Completion | None = None
        self._judging: set[str] = set()

    async def generate(
        self,
        backend: Backend,
        asked: Transcript,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        quiet: bool = False,
    ) -> Transcript:
        """Let the base model answer `prompt`, which asks for the answer to `asked`: the conversation with it."""
        metered = self._run.backend(backend, f"draw {self.index}", quiet=quiet)
        request = Request(prompt=prompt, params=params.model_copy(update={"seed": self.seed}))
        self._completion = await followed(metered, request, self._grow)
        choice = self._completion.choices[0]
        self.text = choice.text
        self.transcript = await asked.answered(backend, prompt, choice)
        return self.transcript

    def judge(self, backend: Backend, name: str) -> Backend:
        """The backend for a call that judges this answer."""
        step = f"judge {self.index} {name}"
        self._judging.add(step)
        return self._run.backend(backend, step)

    def fields(self) -> dict[str, Any]:
        """The fields of a Drawn."""
        done = self._completion
        return {
            "index": self.index,
            "seed": self.seed,
            "text": self.text,
            "token_ids": tuple(self._tokens) if done is None else done.token_ids,
            "finish_reason": None if done is None else done.choices[0].finish_reason,
            "transcript": self.transcript,
            "error": self.error,
            "generating_tokens": len(self._tokens) if done is None else spent(done.usage),
            "judging_tokens": sum(spent(call.usage) for call in self._run.calls if call.step in self._judging),
        }

    def _grow(self, delta: Delta) -> None:
        self.text += delta.text
        self._tokens += delta.token_ids
        if self._heard is not None:
            self._heard(delta.text)
