"""Typed values that cross layers. Pydantic where outside data comes in, frozen dataclasses where we make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended. "length": no room for more tokens, or for one more call of an adapter (`max_invocations`)."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(_Value):
    """A retrieved passage."""

    text: str
    doc_id: str = ""
    title: str = ""


class Message(_Value):
    """One turn of a chat. `documents` are the passages retrieved for this very turn.

    `extra` are further fields of the turn for the chat template, such as `tool_calls` and `tool_call_id`.
    """

    role: str = Field(pattern=r"^(system|user|assistant|tool|document .+)$")
    content: str
    documents: tuple[Document, ...] = ()
    extra: dict[str, Any] = Field(default_factory=dict)


class Chat(_Value):
    """A chat file: messages, and documents that belong to the last user turn among them.

    `appended` turns come after all that, such as an intrinsic's instruction: they take no documents away.
    `tools` and `template_arguments` go to the chat template as they are.
    """

    messages: tuple[Message, ...] = Field(min_length=1)
    documents: tuple[Document, ...] = ()
    appended: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    template_arguments: dict[str, Any] = Field(default_factory=dict)

    def instructed(self, instruction: str, arguments: Mapping[str, Any]) -> Chat:
        """With a user turn added: an intrinsic's instruction, filled with its arguments and `{last_message}`.

        Training and serving both go through here. Raises what str.format raises when an argument is missing.
        """
        text = instruction.format(**{"last_message": self.messages[-1].content, **arguments})
        return self.model_copy(update={"appended": (*self.appended, Message(role="user", content=text))})


class Choice(_Value):
    """Constrain the output to exactly one of these strings."""

    kind: Literal["choice"] = "choice"
    options: tuple[str, ...] = Field(min_length=1)


class Regex(_Value):
    """Constrain the output to a regular expression."""

    kind: Literal["regex"] = "regex"
    pattern: str


class JsonSchema(_Value):
    """Constrain the output to JSON that fits a schema (a JSON document as text)."""

    kind: Literal["json_schema"] = "json_schema"
    schema_text: str


Constraint = Annotated[Choice | Regex | JsonSchema, Field(discriminator="kind")]


class SamplingParams(_Value):
    """How tokens are chosen. The defaults are greedy decoding.

    `top_logprobs` is the number of alternatives reported for each token (0: only the chosen one's, if `logprobs`).
    """

    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=10.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: tuple[str, ...] = Field(default=(), max_length=16)
    n: int = Field(default=1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    ignore_eos: bool = False
    constraint: Constraint | None = None

    @model_validator(mode="after")
    def _check(self) -> SamplingParams:
        if any(not 0 < len(text) <= 256 for text in self.stop):
            raise ValueError("stop strings must have 1 to 256 characters")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class Invocable(_Value):
    """An adapter that the base model's own output may invoke.

    Its answer is decoded by `params` within the room that the request's `max_tokens` leaves. Its tokens stand in the
    output, those of a stop string too, an end-of-sequence token not; then come `closing` and the base model.
    Where `params` has no seed, one is derived from the request's seed, the branch and the number of the call.
    """

    adapter: str
    params: SamplingParams = SamplingParams()
    closing: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Invocable:
        if self.params.n != 1:
            raise ValueError(f"adapter {self.adapter} is invoked for one answer: n must be 1")
        if self.params.logprobs:
            raise ValueError(f"adapter {self.adapter}: the logprobs of an invoked answer are not reported")
        return self


class Request(_Value):
    """One request to a backend: token ids or a chat, at most one adapter, and how to sample.

    With a chat and `invoke`, the history is rendered up to its last message and the adapter's invocation tokens
    are appended. Without it, the prompt must already contain the invocation of an activated adapter.
    Requests reuse each other's KV only within one `cache_scope`.

    Where the base model's output comes to end with the invocation tokens of an `invocable` adapter, the adapter
    answers from there on, its answer joins the output, and the base model reads it and goes on. All tokens of an
    invocation are the base model's own and in one piece. What is inserted counts to `max_tokens`; constraint and stop
    strings look at the base model's own text, a stop string at each piece of it apart. A branch calls at most
    `max_invocations` times: one more invocation ends it with "length".
    """

    prompt: tuple[int, ...] | Chat
    adapter: str | None = None
    invoke: bool = False
    params: SamplingParams = SamplingParams()
    deadline_s: float | None = Field(default=None, gt=0.0)
    cache_scope: str = ""
    invocable: tuple[Invocable, ...] = Field(default=(), max_length=64)
    max_invocations: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check_invocable(self) -> Request:
        names = [invocable.adapter for invocable in self.invocable]
        if names and self.adapter is not None:
            raise ValueError(
                f"only the base model's output invokes adapters: `invocable` excludes adapter={self.adapter!r}"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"invocable names an adapter more than once: {', '.join(twice)}")
        return self


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens and forward passes.

    `cached_tokens` = `cached_base_tokens` + `cached_adapter_tokens`, and `prompt_tokens` = cached + computed, but for
    an answer that its constraint forced whole: that one reads no prompt, and both are 0.
    `computed_tokens` counts prompt positions whose KV this request computed; forced tokens that a constraint
    appends are completion tokens, and so are those of invoked adapters, whose own costs are in their `InvokedCall`.
    `forwards` counts the engine steps that carried at least one token of the request.
    """

    prompt_tokens: int
    cached_base_tokens: int
    cached_adapter_tokens: int
    computed_tokens: int
    completion_tokens: int
    forwards: int

    @property
    def cached_tokens(self) -> int:
        return self.cached_base_tokens + self.cached_adapter_tokens

    def as_dict(self) -> dict[str, int]:
        """The figures a program reads, by name."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.computed_tokens,
            "completion_tokens": self.completion_tokens,
            "forwards": self.forwards,
        }


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token with its text, before temperature and masks.

    `top` are the most likely tokens at its place, likeliest first. Nothing was computed for a token that a constraint
    forced or that an invoked adapter put in: its probability is 1 and its `top` is empty.
    """

    token_id: int
    logprob: float
    text: str = ""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class InvokedCall:
    """An adapter's answer inside the base model's output.

    The invocation begins at offset `start` of the choice's `token_ids`; the answer's `token_ids` end before `end`.
    `finish_reason` is the answer's own, and "length" where the request's `max_tokens` cut it short.
    `probabilities`: of each option of a choice constraint, else None. `usage`: what the adapter's sequence cost, whose
    prompt is everything up to and with the invocation.
    """

    adapter: str
    start: int
    end: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    probabilities: dict[str, float] | None
    usage: Usage
    seconds: float


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One of a request's `n` answers. `probabilities`: of each option of a choice constraint, else None.

    `calls` are the adapters that the output invoked, in order; `text` and `token_ids` hold their answers.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    probabilities: dict[str, float] | None = None
    calls: tuple[InvokedCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request. `activation_index` is None for the base model and 0 for a plain LoRA."""

    request_id: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    adapter: str | None
    activation_index: int | None
    seconds: float
    time_to_first_token_s: float | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer. The last one of a stream carries the whole `completion` and no text."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of given continuations. `logprobs[i][j]`: of token j of continuation i."""

    logprobs: tuple[tuple[float, ...], ...]
    usage: Usage
    activation_index: int | None
    seconds: float

    @property
    def totals(self) -> tuple[float, ...]:
        """Summed log-probability of each continuation."""
        return tuple(sum(row) for row in self.logprobs)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a caller may know of a loaded adapter. `contract` is the text of its io.yaml, None where it has none."""

    name: str
    kind: Literal["lora", "alora"]
    digest: str
    path: str
    invocation_tokens: tuple[int, ...]
    invocation_text: str
    rank: int
    size_bytes: int
    pinned: bool = False
    contract: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
