"""OpenAI's response objects, made of completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.errors import InputError, MidstreamError, PromptTooLong
from midstream.intrinsics import IntrinsicResult
from midstream.types import Completion, Delta, TokenLogprob, Usage

# JSON has no minus infinity; clients know this value from vLLM.
_LEAST_LOGPROB = -9999.0

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


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


def chat_completion(head: Head, completion: Completion) -> dict[str, Any]:
    """`chat.completion`."""
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in completion.choices
    ]
    return head.of("chat.completion", choices, usage=usage(completion.usage))


def chat_chunk(head: Head, delta: Delta, *, first: bool, logprobs: bool) -> dict[str, Any]:
    """`chat.completion.chunk` of a piece of one answer."""
    role = {"role": "assistant"} if first else {}
    choice = {
        "index": delta.index,
        "delta": {**role, "content": delta.text},
        "logprobs": chat_logprobs(delta.logprobs) if logprobs else None,
        "finish_reason": None,
    }
    return head.of("chat.completion.chunk", [choice])


def chat_end(head: Head, index: int, reason: str) -> dict[str, Any]:
    """The last chunk of one answer."""
    choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
    return head.of("chat.completion.chunk", [choice])


def text_completion(head: Head, completions: Sequence[Completion], *, logprobs: bool) -> dict[str, Any]:
    """`text_completion` of one or several prompts; choices are numbered through."""
    each = [choice for completion in completions for choice in completion.choices]
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": text_logprobs(choice.logprobs or (), 0) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(each)
    ]
    return head.of("text_completion", choices, usage=usage(*(completion.usage for completion in completions)))


def text_chunk(head: Head, delta: Delta, *, logprobs: bool, offset: int) -> dict[str, Any]:
    """A piece of a streamed `text_completion`; `offset` is where its text begins."""
    shown = text_logprobs(delta.logprobs, offset) if logprobs else None
    choice = {"index": delta.index, "text": delta.text, "logprobs": shown, "finish_reason": None}
    return head.of("text_completion", [choice])


def text_end(head: Head, index: int, reason: str) -> dict[str, Any]:
    return head.of("text_completion", [{"index": index, "text": "", "logprobs": None, "finish_reason": reason}])


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


def chat_logprobs(each: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [{**_logprob(one), "top_logprobs": [_logprob(other) for other in one.top]} for one in each]
    return {"content": content, "refusal": None}


def text_logprobs(each: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets: list[int] = []
    for one in each:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in each],
        "token_logprobs": [_finite(one.logprob) for one in each],
        "top_logprobs": [{other.text: _finite(other.logprob) for other in one.top} for one in each],
        "text_offset": offsets,
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


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    # Of a token that is a part of a character the text is a stand-in, and its bytes would be those of the stand-in.
    known = None if "\ufffd" in one.text else list(one.text.encode())
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": known}


def _finite(value: float) -> float:
    return max(value, _LEAST_LOGPROB)
