"""A server without this project's extensions: what it leaves out is found, or said to be unknown."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterFormatError, AdapterNotFound, BackendError, InputError, InvocationError
from midstream.intrinsics import IntrinsicResult, call_intrinsics
from midstream.remote import RemoteBackend
from midstream.types import Chat, Choice, Document, Invocable, Message, Regex, Request, SamplingParams
from tests.remote.vllm_shaped import VllmShaped

IDS = tuple(range(40, 80))
CHAT = Chat(messages=(Message(role="user", content="hello there"),), documents=(Document(text="a fact", title="T"),))


@pytest.fixture
def shaped(embedded: AsyncEngine) -> VllmShaped:
    return VllmShaped(embedded)


@pytest.fixture
async def plain(shaped: VllmShaped, embedded: AsyncEngine) -> AsyncIterator[RemoteBackend]:
    folders = [info.path for info in embedded.adapter_infos() if info.name != "certainty"]
    async with RemoteBackend("http://vllm:8000/v1", adapters=folders, transport=shaped.transport) as backend:
        yield backend


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "request_",
    [
        Request(prompt=IDS, params=SamplingParams(max_tokens=7, ignore_eos=True)),
        Request(prompt=CHAT, params=SamplingParams(max_tokens=7, n=2, seed=3, temperature=1.0, ignore_eos=True)),
        Request(prompt=IDS, params=SamplingParams(max_tokens=7, logprobs=True, top_logprobs=3, ignore_eos=True)),
        Request(prompt=IDS, params=SamplingParams(max_tokens=9, constraint=Regex(pattern="[ab]{3}"))),
        Request(prompt=CHAT, adapter="jailbreak", invoke=True, params=SamplingParams(max_tokens=5)),
        Request(prompt=CHAT, adapter="twin", params=SamplingParams(max_tokens=5)),
    ],
    ids=lambda r: str(r)[:50] if isinstance(r, Request) else None,
)
async def test_answers_are_those_of_the_engine_below(
    plain: RemoteBackend, embedded: AsyncEngine, request_: Request, stream: bool
) -> None:
    expected = await embedded.complete(request_)
    if stream:
        *pieces, last = [delta async for delta in plain.stream(request_)]
        found = last.completion
        first = [token for piece in pieces if piece.index == 0 for token in piece.token_ids]
        assert found is not None
        assert tuple(first) == found.choices[0].token_ids
        assert found.time_to_first_token_s is not None
    else:
        found = await plain.complete(request_)
    assert found.choices == expected.choices
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.activation_index == expected.activation_index
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert found.usage.computed_tokens == found.usage.prompt_tokens, "nothing is known of its cache"
    assert found.usage.forwards == 0


async def test_every_field_whose_default_is_the_servers_own_is_sent(plain: RemoteBackend, shaped: VllmShaped) -> None:
    await plain.complete(Request(prompt=IDS, cache_scope="tenant", params=SamplingParams(max_tokens=1)))
    body = shaped.bodies[-1]
    assert body["cache_salt"] == "tenant"
    assert {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}.items() <= body.items()
    assert body["return_token_ids"] is True
    assert body["skip_special_tokens"] is False
    assert "logprobs" not in body


async def test_cached_tokens_are_the_base_models_up_to_the_activation(embedded: AsyncEngine) -> None:
    folders = [info.path for info in embedded.adapter_infos()]
    shaped = VllmShaped(embedded, details=True)
    async with RemoteBackend("http://vllm:8000", adapters=folders, transport=shaped.transport) as plain:
        for adapter in (None, "jailbreak", "twin"):
            invoke = adapter == "jailbreak"
            request = Request(prompt=CHAT, adapter=adapter, invoke=invoke, params=SamplingParams(max_tokens=2))
            await embedded.complete(request)
            expected = await embedded.complete(request)
            found = await plain.complete(request)
            assert found.usage.cached_base_tokens == expected.usage.cached_base_tokens
            assert found.usage.cached_adapter_tokens == expected.usage.cached_adapter_tokens
            assert found.usage.computed_tokens == expected.usage.computed_tokens


async def likely(embedded: AsyncEngine) -> list[str]:
    """Letters by how likely they begin the answer to IDS."""
    params = SamplingParams(max_tokens=1, logprobs=True, top_logprobs=20)
    (token,) = (await embedded.complete(Request(prompt=IDS, params=params))).choices[0].logprobs or ()
    return [one.text for one in token.top if one.text.isascii() and one.text.isprintable() and one.text]


@pytest.mark.parametrize(("asked", "top"), [(False, 0), (True, 0), (True, 3)])
async def test_a_choices_probabilities_are_found_from_logprobs(
    plain: RemoteBackend, shaped: VllmShaped, embedded: AsyncEngine, asked: bool, top: int
) -> None:
    one, other, *_ = await likely(embedded)
    params = SamplingParams(constraint=Choice(options=(one + "!", other + "?")), logprobs=asked, top_logprobs=top)
    request = Request(prompt=IDS, params=params)
    expected = (await embedded.complete(request)).choices[0]
    for completion in (await plain.complete(request), [d async for d in plain.stream(request)][-1].completion):
        assert completion is not None
        (found,) = completion.choices
        assert expected.probabilities is not None
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
        if not asked:
            assert found.logprobs is None, "they are given only where they were asked for"
            continue
        decided, rest = found.logprobs or ()
        assert decided == (expected.logprobs or ())[0]
        assert len(rest.top) <= top
    assert shaped.bodies[-1]["logprobs"] == 20


async def test_an_option_that_may_matter_but_is_not_shown_leaves_them_unknown(
    plain: RemoteBackend, embedded: AsyncEngine
) -> None:
    shown = await likely(embedded)
    hidden = next(chr(code) for code in range(97, 123) if chr(code) not in shown)
    params = SamplingParams(constraint=Choice(options=(shown[0], hidden)))
    assert (await plain.complete(Request(prompt=IDS, params=params))).choices[0].probabilities is None


@pytest.mark.parametrize(
    ("options", "expected"), [(("only",), {"only": 1.0}), (("ab", "ac", "b"), None), (("a", "ab"), None)]
)
async def test_one_option_is_certain_and_several_partings_are_unknown(
    plain: RemoteBackend, shaped: VllmShaped, options: tuple[str, ...], expected: dict[str, float] | None
) -> None:
    found = await plain.complete(Request(prompt=IDS, params=SamplingParams(constraint=Choice(options=options))))
    assert found.choices[0].probabilities == expected
    assert "logprobs" not in shaped.bodies[-1]


async def test_texts_of_tokens_are_asked_for_once(plain: RemoteBackend, shaped: VllmShaped) -> None:
    request = Request(prompt=IDS, params=SamplingParams(max_tokens=3, logprobs=True, top_logprobs=5, ignore_eos=True))
    first = await plain.complete(request)
    asked = shaped.detokenized
    assert 0 < asked <= 3 * 6 + 1
    assert await plain.complete(request.model_copy()) is not first
    assert shaped.detokenized == asked


async def test_scores_come_from_prompt_logprobs(plain: RemoteBackend, embedded: AsyncEngine) -> None:
    request = Request(prompt=CHAT, adapter="jailbreak", invoke=True)
    continuations = [[40, 41, 42], [50, 51, 52]]
    expected = await embedded.score(request, continuations)
    found = await plain.score(request, continuations)
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5), "computed in other steps"
    assert found.activation_index == expected.activation_index
    for bad in ([], [[]]):
        with pytest.raises(InputError):
            await plain.score(request, bad)


async def test_chats_are_written_in_its_fields(plain: RemoteBackend, embedded: AsyncEngine) -> None:
    appended = CHAT.model_copy(update={"appended": (Message(role="user", content="judge"),)})
    for chat in (CHAT, appended):
        for header in (True, False):
            assert await plain.tokenize(chat, header=header) == await embedded.tokenize(chat, header=header)
    with pytest.raises(InputError, match="takes no tools"):
        await plain.tokenize(CHAT.model_copy(update={"tools": ({"type": "function", "function": {"name": "f"}},)}))


async def test_local_folders_say_how_adapters_are_called(plain: RemoteBackend, embedded: AsyncEngine) -> None:
    infos = {info.name: info for info in await plain.adapters()}
    for expected in embedded.adapter_infos():
        if expected.name == "certainty":
            assert "certainty" not in infos
            continue
        found = infos[expected.name]
        assert (found.kind, found.rank, found.contract) == (expected.kind, expected.rank, expected.contract)
        assert found.invocation_tokens == expected.invocation_tokens
        assert found.metadata == expected.metadata
    with pytest.raises(AdapterNotFound, match="give its PEFT folder"):
        await plain.complete(Request(prompt=IDS, adapter="certainty", invoke=True))
    with pytest.raises(AdapterNotFound, match="loaded: answerability"):
        await plain.complete(Request(prompt=IDS, adapter="nobody"))


async def test_a_prompt_without_the_invocation_is_never_sent(plain: RemoteBackend, shaped: VllmShaped) -> None:
    with pytest.raises(InvocationError):
        await plain.complete(Request(prompt=IDS, adapter="jailbreak"))
    with pytest.raises(InputError, match="no midstream server"):
        await plain.complete(Request(prompt=IDS, invocable=(Invocable(adapter="jailbreak"),)))
    assert not shaped.bodies


async def test_intrinsics_run_on_it(plain: RemoteBackend, embedded: AsyncEngine) -> None:
    names = ["jailbreak", "answerability"]
    for one, other in zip(
        await call_intrinsics(plain, names, CHAT), await call_intrinsics(embedded, names, CHAT), strict=True
    ):
        assert isinstance(one, IntrinsicResult)
        assert isinstance(other, IntrinsicResult)
        assert (one.result, one.activation_index) == (other.result, other.activation_index)


async def test_the_servers_errors_keep_their_meaning(plain: RemoteBackend, shaped: VllmShaped) -> None:
    with pytest.raises(InputError, match="over the context"):
        await plain.complete(Request(prompt=IDS, params=SamplingParams(max_tokens=10**6)))
    async with RemoteBackend("http://vllm:8000", model="other", transport=shaped.transport) as other:
        with pytest.raises(InputError, match="does not exist") as found:
            await other.complete(Request(prompt=IDS))
        assert found.value.code == "model_not_found"


def test_a_broken_folder_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterFormatError) as found:
        RemoteBackend("http://vllm:8000", adapters=[tmp_path])
    assert "adapter_model.safetensors" in str(found.value)
    assert "IA3" in str(found.value)


async def test_a_server_without_token_ids_is_named_as_such(embedded: AsyncEngine) -> None:
    shaped = VllmShaped(embedded)
    inner = shaped.transport

    async def without(request: httpx.Request) -> httpx.Response:
        response = await inner.handle_async_request(request)
        body = json.loads(await response.aread())
        for choice in body.get("choices", ()):
            choice.pop("token_ids")
        return httpx.Response(200, json=body)

    async with RemoteBackend("http://old:8000", transport=httpx.MockTransport(without)) as backend:
        with pytest.raises(BackendError, match=r"return_token_ids.*0\.10\.2"):
            await backend.complete(Request(prompt=IDS, params=SamplingParams(max_tokens=1)))
