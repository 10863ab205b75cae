"""OpenAI's response objects, made of completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.errors import InputError, MidstreamError, PromptTooLong
from midstream.intrinsics import IntrinsicResult
from midstream.types import Completion, CompletionChoice, Delta, InvokedCall, Score, TokenLogprob, Usage

# JSON has no minus infinity; clients know this value from vLLM.
_LEAST_LOGPROB = -9999.0

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    422: "invalid_output_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one response begins with."""

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def chat(cls, model: str) -> Head:
        return cls(model, f"chatcmpl-{uuid.uuid4().hex}")

    @classmethod
    def text(cls, model: str) -> Head:
        return cls(model, f"cmpl-{uuid.uuid4().hex}")

    def of(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": None,
            **more,
        }


@dataclass(frozen=True, slots=True)
class Shown:
    """What of an answer's tokens a request asked to see: vLLM's `return_token_ids`, `return_tokens_as_token_ids`."""

    logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False

    def ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self.token_ids else {}

    def prompt(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"prompt_token_ids": list(tokens)} if self.token_ids else {}


def chat_completion(head: Head, completion: Completion, shown: Shown) -> dict[str, Any]:
    """`chat.completion`."""
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs, shown),
            **_end(choice, completion),
            **shown.ids(choice.token_ids),
        }
        for choice in completion.choices
    ]
    prompt = shown.prompt(completion.prompt_token_ids)
    return head.of("chat.completion", choices, usage=usage(completion.usage), **times(completion), **prompt)


def chat_chunk(head: Head, delta: Delta, shown: Shown, *, first: bool, prompt: Sequence[int]) -> dict[str, Any]:
    """`chat.completion.chunk` of a piece of one answer to the tokens of `prompt`."""
    role = {"role": "assistant"} if first else {}
    choice = {
        "index": delta.index,
        "delta": {**role, "content": delta.text},
        "logprobs": chat_logprobs(delta.logprobs, shown) if shown.logprobs else None,
        "finish_reason": None,
        **shown.ids(delta.token_ids),
    }
    return head.of("chat.completion.chunk", [choice], **(shown.prompt(prompt) if first else {}))


def chat_end(head: Head, choice: CompletionChoice, completion: Completion) -> dict[str, Any]:
    """The last chunk of one answer."""
    last = {"index": choice.index, "delta": {}, "logprobs": None, **_end(choice, completion)}
    return head.of("chat.completion.chunk", [last])


def text_completion(head: Head, completions: Sequence[Completion], shown: Shown) -> dict[str, Any]:
    """`text_completion` of one or several prompts; choices are numbered through."""
    each = [(choice, completion) for completion in completions for choice in completion.choices]
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": text_logprobs(choice.logprobs or (), 0, shown) if shown.logprobs else None,
            **_end(choice, completion),
            **shown.ids(choice.token_ids),
            **shown.prompt(completion.prompt_token_ids),
        }
        for index, (choice, completion) in enumerate(each)
    ]
    used = usage(*(completion.usage for completion in completions))
    return head.of("text_completion", choices, usage=used, **times(*completions))


def text_chunk(
    head: Head, delta: Delta, shown: Shown, *, offset: int, first: bool, prompt: Sequence[int]
) -> dict[str, Any]:
    """A piece of a streamed `text_completion`; `offset` is where its text begins."""
    choice = {
        "index": delta.index,
        "text": delta.text,
        "logprobs": text_logprobs(delta.logprobs, offset, shown) if shown.logprobs else None,
        "finish_reason": None,
        **shown.ids(delta.token_ids),
        **(shown.prompt(prompt) if first else {}),
    }
    return head.of("text_completion", [choice])


def text_end(head: Head, choice: CompletionChoice, completion: Completion) -> dict[str, Any]:
    """The last chunk of one answer."""
    last = {"index": choice.index, "text": "", "logprobs": None, **_end(choice, completion)}
    return head.of("text_completion", [last])


def _end(choice: CompletionChoice, completion: Completion) -> dict[str, Any]:
    """How an answer ended. What follows its reason is this project's own."""
    return {
        "finish_reason": choice.finish_reason,
        "probabilities": choice.probabilities,
        "activation_index": completion.activation_index,
        **({"calls": [_call(call) for call in choice.calls]} if choice.calls else {}),
    }


def _call(call: InvokedCall) -> dict[str, Any]:
    """An adapter's answer inside the base model's output."""
    return {
        "adapter": call.adapter,
        "start": call.start,
        "end": call.end,
        "text": call.text,
        "token_ids": list(call.token_ids),
        "finish_reason": call.finish_reason,
        "probabilities": call.probabilities,
        "usage": usage(call.usage),
        "seconds": call.seconds,
    }


def times(*each: Completion) -> dict[str, float | None]:
    """How long it took, until the last prompt's answer was whole and until the first token of any."""
    first = [one.time_to_first_token_s for one in each if one.time_to_first_token_s is not None]
    return {"seconds": max(one.seconds for one in each), "time_to_first_token_s": min(first, default=None)}


def score(model: str, found: Score) -> dict[str, Any]:
    """`score_continuations`."""
    return {
        "object": "score_continuations",
        "model": model,
        "logprobs": [[_finite(value) for value in row] for row in found.logprobs],
        "usage": usage(found.usage),
        "activation_index": found.activation_index,
        "seconds": found.seconds,
    }


def usage(*each: Usage) -> dict[str, Any]:
    """OpenAI's usage, summed over prompts. Its last two fields are this project's own."""
    prompt = sum(u.prompt_tokens for u in each)
    completion = sum(u.completion_tokens for u in each)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(u.cached_tokens for u in each),
            "cached_base_tokens": sum(u.cached_base_tokens for u in each),
            "cached_adapter_tokens": sum(u.cached_adapter_tokens for u in each),
        },
        "computed_tokens": sum(u.computed_tokens for u in each),
        "forwards": sum(u.forwards for u in each),
    }


def chat_logprobs(each: Sequence[TokenLogprob], shown: Shown) -> dict[str, Any]:
    content = [{**_logprob(one, shown), "top_logprobs": [_logprob(other, shown) for other in one.top]} for one in each]
    return {"content": content, "refusal": None, **_texts(each, shown)}


def text_logprobs(each: Sequence[TokenLogprob], offset: int, shown: Shown) -> dict[str, Any]:
    offsets: list[int] = []
    for one in each:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [_token(one, shown) for one in each],
        "token_logprobs": [_finite(one.logprob) for one in each],
        "top_logprobs": [{_token(other, shown): _finite(other.logprob) for other in one.top} for one in each],
        "text_offset": offsets,
        **_texts(each, shown),
    }


def intrinsic_result(result: IntrinsicResult) -> dict[str, Any]:
    """`intrinsic.result`: its own fields, with OpenAI's usage."""
    return {"object": "intrinsic.result", **result.as_dict(), "usage": usage(result.usage)}


def error_object(error: MidstreamError, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    default = "invalid_request_error" if isinstance(error, InputError) or error.status < 500 else "server_error"
    # OpenAI's client shows the message alone, and what is built on it looks for this code there.
    code = f" ({error.code})" if isinstance(error, PromptTooLong) else ""
    return {
        "message": f"{error}{code}",
        "type": _TYPES.get(error.status, default),
        "param": param,
        "code": error.code,
    }


def _token(one: TokenLogprob, shown: Shown) -> str:
    return f"token_id:{one.token_id}" if shown.tokens_as_ids else one.text


def _texts(each: Sequence[TokenLogprob], shown: Shown) -> dict[str, Any]:
    """Where tokens are shown as their ids, the text of each."""
    if not shown.tokens_as_ids:
        return {}
    return {"token_texts": {_token(one, shown): one.text for token in each for one in (token, *token.top)}}


def _logprob(one: TokenLogprob, shown: Shown) -> dict[str, Any]:
    # Of a token that is a part of a character the text is a stand-in, and its bytes would be those of the stand-in.
    known = None if "\ufffd" in one.text else list(one.text.encode())
    return {"token": _token(one, shown), "logprob": _finite(one.logprob), "bytes": known}


def _finite(value: float) -> float:
    return max(value, _LEAST_LOGPROB)
