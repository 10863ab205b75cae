"""Chat completion requests and replies as programs send them, as far as contracts read and change them.

Dumped without what was not set, a value comes out as it went in, its known fields first and in this order: clients
compare requests as text. Messages, documents, choices and tokens lose the fields that are not listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from midstream.errors import InputError
from midstream.types import TokenLogprob

T = TypeVar("T", bound=BaseModel)

_NO_ID = -1  # the wire has texts of tokens, and no ids


def _in_order(*names: str) -> Callable[[Any], Any]:
    """Of a mapping that has the first required name, the named entries in that order; all else stays as it is."""

    def sorted_entries(value: Any) -> Any:
        if not isinstance(value, Mapping) or "name" not in value:
            return value
        return {name: value[name] for name in names if name in value}

    return sorted_entries


class WireDocument(BaseModel):
    """A document of a request."""

    text: str
    title: str | None = None
    doc_id: str | None = None


class WireMessage(BaseModel):
    """A message of a request or of a reply."""

    content: str
    role: str = Field(pattern=r"^(system|developer|user|assistant|tool|document .+)$")
    tool_calls: list[Annotated[Any, BeforeValidator(_in_order("id", "name", "arguments"))]] | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None


class ExtraBody(BaseModel):
    """What a request has beyond OpenAI's fields."""

    model_config = ConfigDict(extra="allow")

    documents: list[WireDocument] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


class ChatBody(BaseModel):
    """A chat completion request."""

    model_config = ConfigDict(extra="allow")

    messages: list[WireMessage] = Field(min_length=1)
    model: str | None = None
    tools: list[Annotated[Any, BeforeValidator(_in_order("name", "description", "parameters"))]] | None = None
    extra_body: ExtraBody | None = None


class WireLogprob(BaseModel):
    """The text of a token and its log-probability."""

    token: str
    logprob: float = -9999.0


class WireToken(WireLogprob):
    """A token of an answer, with the likeliest ones at its place."""

    top_logprobs: list[WireLogprob] = []

    def value(self) -> TokenLogprob:
        top = tuple(TokenLogprob(_NO_ID, other.logprob, other.token) for other in self.top_logprobs)
        return TokenLogprob(_NO_ID, self.logprob, self.token, top)


class WireLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[WireToken] | None = None


class WireChoice(BaseModel):
    """One answer of a reply."""

    index: int
    message: WireMessage
    logprobs: WireLogprobs | None = None
    finish_reason: str | None = "stop"


class ChatReply(BaseModel):
    """A chat completion."""

    model_config = ConfigDict(extra="allow")

    choices: list[WireChoice]
    prompt_logprobs: Any = None


def read(kind: type[T], value: Mapping[str, Any], what: str) -> T:
    """A value from outside. Raises InputError that names every field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors())
        raise InputError(f"{what}: {wrong}") from error


def ordered(kind: type[BaseModel], value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping, those first that `kind` has fields for."""
    known = [name for name in kind.model_fields if name in value]
    return {**{name: value[name] for name in known}, **value}
