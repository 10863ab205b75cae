"""A server that speaks as vLLM does, over a tiny engine: none of this project's extensions, unknown fields ignored."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from midstream.engine.engine import AsyncEngine
from midstream.errors import MidstreamError
from midstream.types import Choice, Completion, Regex, Request, SamplingParams, TokenLogprob


class VllmShaped:
    """Answers requests; `bodies` are those of the completions it was asked for."""

    def __init__(self, engine: AsyncEngine, *, details: bool = False) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.detokenized = 0
        self._engine = engine
        self._details = details

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._answer)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        answers = {"/tokenize": self._tokenize, "/detokenize": self._detokenize, "/v1/completions": self._complete}
        try:
            if request.url.path == "/v1/models":
                return httpx.Response(200, json=self._models())
            if request.url.path in answers:
                return await answers[request.url.path](body)
        except MidstreamError as error:
            return _refused(str(error), "BadRequestError", 400)
        return _refused("Not Found", "Not Found", 404)

    def _models(self) -> dict[str, Any]:
        entries = [("tiny", None), *((info.name, "tiny") for info in self._engine.adapter_infos())]
        limits = {None: {"max_model_len": self._engine.max_context_tokens}}
        data = [
            {"id": name, "object": "model", "owned_by": "vllm", "parent": parent, **limits.get(parent, {})}
            for name, parent in entries
        ]
        return {"object": "list", "data": data}

    async def _tokenize(self, body: dict[str, Any]) -> httpx.Response:
        chat = self._engine.chat
        if "prompt" in body:
            tokens = chat.encode(body["prompt"])
        else:
            options = dict(body.get("chat_template_kwargs") or {})
            text = chat.tokenizer.apply_chat_template(
                body["messages"],
                tokenize=False,
                add_generation_prompt=body.get("add_generation_prompt", True),
                tools=body.get("tools"),
                **options,
            )
            tokens = chat.encode(text)
        return httpx.Response(200, json={"count": len(tokens), "max_model_len": 2048, "tokens": list(tokens)})

    async def _detokenize(self, body: dict[str, Any]) -> httpx.Response:
        self.detokenized += 1
        return httpx.Response(200, json={"prompt": self._engine.chat.decode(body["tokens"])})

    async def _complete(self, body: dict[str, Any]) -> httpx.Response:
        self.bodies.append(body)
        if body["model"] not in ("tiny", *(info.name for info in self._engine.adapter_infos())):
            return _refused(f"The model `{body['model']}` does not exist.", "NotFoundError", 404)
        if "prompt_logprobs" in body:
            return await self._prompt_logprobs(body)
        completion = await self._engine.complete(self._request(body))
        choices = [self._choice(body, completion, index) for index in range(body["n"])]
        usage = self._usage(completion)
        if body.get("stream"):
            return httpx.Response(200, content=_chunks(choices, usage), headers={"content-type": "text/event-stream"})
        return httpx.Response(
            200, json={"id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": usage}
        )

    def _request(self, body: dict[str, Any]) -> Request:
        wanted = body.get("structured_outputs") or {}
        constraint: Any = None
        if "choice" in wanted:
            constraint = Choice(options=tuple(wanted["choice"]))
        elif "regex" in wanted:
            constraint = Regex(pattern=wanted["regex"])
        params = SamplingParams(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            n=body["n"],
            seed=body.get("seed"),
            stop=tuple(body["stop"]),
            ignore_eos=body["ignore_eos"],
            logprobs="logprobs" in body,
            top_logprobs=body.get("logprobs") or 0,
            constraint=constraint,
        )
        adapter = None if body["model"] == "tiny" else body["model"]
        return Request(prompt=tuple(body["prompt"]), adapter=adapter, params=params)

    def _choice(self, body: dict[str, Any], completion: Completion, index: int) -> dict[str, Any]:
        choice = completion.choices[index]
        return {
            "index": index,
            "text": choice.text,
            "logprobs": None if choice.logprobs is None else _logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": None,
            "token_ids": list(choice.token_ids),
            "prompt_token_ids": body["prompt"],
        }

    def _usage(self, completion: Completion) -> dict[str, Any]:
        used = completion.usage
        details = {"prompt_tokens_details": {"cached_tokens": used.cached_tokens}} if self._details else {}
        return {
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            **details,
        }

    async def _prompt_logprobs(self, body: dict[str, Any]) -> httpx.Response:
        adapter = None if body["model"] == "tiny" else body["model"]
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            # The engine scores after a prompt of at least the invocation, so everything but the ends is left out.
            head = len(prompt) - 3
            found = await self._engine.score(Request(prompt=tuple(prompt[:head]), adapter=adapter), [prompt[head:]])
            places = [
                {str(token): {"logprob": value, "rank": 1, "decoded_token": "?"}, "7": {"logprob": -1.0}}
                for token, value in zip(prompt[head:], found.logprobs[0], strict=True)
            ]
            choices.append({"index": index, "text": "x", "prompt_logprobs": [None] * head + places})
        usage = {"prompt_tokens": sum(map(len, body["prompt"])), "completion_tokens": len(choices), "total_tokens": 0}
        return httpx.Response(200, json={"id": "cmpl-2", "choices": choices, "usage": usage})


async def _chunks(choices: list[dict[str, Any]], usage: dict[str, Any]) -> AsyncIterator[bytes]:
    """A chunk for the first token, one for the rest with its reason, one with the usage."""
    for choice in choices:
        logprobs = choice["logprobs"]
        for part, text, reason in ((slice(0, 1), "", None), (slice(1, None), choice["text"], choice["finish_reason"])):
            some = logprobs and {key: values[part] for key, values in logprobs.items()}
            piece = {"token_ids": choice["token_ids"][part], "logprobs": some, "text": text, "finish_reason": reason}
            yield _event({"id": "cmpl-1", "choices": [{"index": choice["index"], **piece}]})
    yield b": a comment\n\n"
    yield _event({"id": "cmpl-1", "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _logprobs(each: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """The chosen token comes first, whatever its rank."""
    tops = [{f"token_id:{one.token_id}": max(one.logprob, -9999.0) for one in (token, *token.top)} for token in each]
    return {
        "tokens": [f"token_id:{token.token_id}" for token in each],
        "token_logprobs": [max(token.logprob, -9999.0) for token in each],
        "top_logprobs": tops,
        "text_offset": [0] * len(each),
    }


def _refused(message: str, kind: str, status: int) -> httpx.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return httpx.Response(status, json=body)
