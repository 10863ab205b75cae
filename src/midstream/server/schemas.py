"""Request bodies. Unknown fields are errors; known ones that change nothing are taken, those not served are refused."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from midstream.types import Chat, Document

Name = Annotated[str, Field(min_length=1, max_length=256)]


class Part(BaseModel):
    """Root of what bodies are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Body(Part):
    """Root of all bodies."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        _refuse_surrogates(data)
        return data


class Passage(Part):
    """A document. Clients send null for what a passage has not."""

    text: str
    doc_id: str | None = None
    title: str | None = None

    def document(self) -> Document:
        return Document(text=self.text, doc_id=self.doc_id or "", title=self.title or "")


class TextPart(Part):
    """A part of a message. Only text is served."""

    type: Literal["text", "input_text"]
    text: str


class Turn(Part):
    """A message. `documents` (an extension) are the passages that were retrieved for this very turn."""

    role: Annotated[str, Field(pattern=r"^(system|developer|user|assistant|tool|document .+)$")]
    content: str | list[TextPart] | None = None
    documents: list[Passage] = Field(default_factory=list)
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchemaFormat(Part):
    """An answer is always held to its schema; with `strict`, its objects have no properties but those that it names."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema goes with type json_schema, not with {self.type}")
        return self


class StructuredOutputs(Part):
    """vLLM's field: exactly one of these. `json` may be a schema or its text.

    A text is taken as it stands; of a schema that lists its values, each is an option of a choice.
    """

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [self.json_ is not None, bool(self.json_object), self.regex is not None, self.choice is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of json, json_object, regex and choice")
        return self


class Decoding(Part):
    """How an answer is decoded."""

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=10.0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(
        default=None, description="The older name of structured_outputs.json, which Mellea sends with texts."
    )
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        response_format = self.response_format and self.response_format.type != "text"
        if sum(map(bool, (response_format, self.structured_outputs, self.guided_json is not None))) > 1:
            raise ValueError("response_format, structured_outputs and guided_json exclude each other")
        return self


class InvocableBody(Part):
    """An adapter that the base model's output may invoke. Without `params` its contract says how it answers; with
    them, they alone do (greedy, 256 tokens at most, where they say nothing). `closing`: what follows its answer."""

    adapter: Name
    closing: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    params: Decoding | None = None


class Sampling(Body, Decoding):
    """What both completion endpoints share. No temperature: 1 for the base model, 0 for an adapter."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    invocable: list[Name | InvocableBody] | None = Field(
        default=None,
        max_length=64,
        description="Adapters that the base model's own output may invoke; of a name alone, the contract says how.",
    )
    max_invocations: int = Field(default=8, ge=1)
    return_token_ids: bool | None = Field(default=None, description="Add `token_ids` and `prompt_token_ids`.")
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="In logprobs, tokens read `token_id:7`; `token_texts` has the text of each."
    )
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=1024, description="KV is shared only among requests with the same salt."
    )
    skip_special_tokens: Literal[False] | None = None
    # Taken because clients send them; only values that change nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    best_of: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true")
        return self


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Turn] = Field(min_length=1)
    documents: list[Passage] | None = None
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="The newer name of max_tokens. Mellea sends both; this one goes first."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None


class TextBody(Sampling):
    """`POST /v1/completions`: a text, several, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class ScoreBody(Body):
    """`POST /v1/score_continuations`: token ids, and what may come after them."""

    model: Name | None = None
    prompt: list[int] = Field(min_length=1)
    continuations: list[Annotated[list[int], Field(min_length=1)]] = Field(min_length=1, max_length=1024)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)


class IntrinsicBody(Body):
    """`POST /v1/intrinsics/{name}`."""

    messages: list[Turn] = Field(min_length=1)
    documents: list[Passage] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)


class FanOutBody(Body):
    """`POST /v1/intrinsics`: several on one conversation. `arguments` are by intrinsic."""

    names: list[Name] = Field(min_length=1, max_length=64, json_schema_extra={"uniqueItems": True})
    messages: list[Turn] = Field(min_length=1)
    documents: list[Passage] | None = None
    arguments: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        repeated = sorted(name for name, times in Counter(self.names).items() if times > 1)
        if repeated:
            raise ValueError(f"names has each intrinsic once; repeated: {', '.join(repeated)}")
        unnamed = sorted(self.arguments.keys() - set(self.names))
        if unnamed:
            raise ValueError(f"arguments are for intrinsics that names does not have: {', '.join(unnamed)}")
        return self


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt, messages as the named model would see them, or a chat as the library has it.

    A `chat` goes to the template unchanged: nothing in it is read as a call of an adapter.
    """

    model: Name | None = None
    prompt: str | None = None
    chat: Chat | None = None
    messages: list[Turn] | None = Field(default=None, min_length=1)
    documents: list[Passage] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: Literal[False] = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.chat, self.messages)) != 1:
            raise ValueError("give either prompt, messages or chat")
        with_messages = ("documents", "tools", "chat_template_kwargs")
        if self.messages is None and (given := [name for name in with_messages if getattr(self, name)]):
            raise ValueError(f"{', '.join(given)} go with messages, not with prompt or chat")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class LoadAdapterBody(Body):
    """`POST /v1/load_lora_adapter`: a folder below the server's adapter folder."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: int | None = None


def _refuse_surrogates(data: Any) -> None:
    """Half a surrogate pair can be written in JSON, but is no text: no tokenizer and no answer can hold it."""
    stack = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            _encode(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _encode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half a surrogate pair, which is not valid Unicode") from error
