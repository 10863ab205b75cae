"""What every side is asked: the works of the comparison as token ids, written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from benchmarks.common import context
from benchmarks.peers_protocol import Call, Label
from benchmarks.turn_script import INTRINSICS, OPENING, REWRITE
from benchmarks.turn_sides import parted
from midstream.intrinsics.spec import load_contract
from midstream.models.chat import ChatTokenizer
from midstream.session import Engine
from midstream.types import AdapterInfo

PREFILL = (512, 2048, 4096)
DEPTHS = (0, 2048, 4096)
CALLS = (500, 1500, 3000, 6000)
FREE = 16  # tokens of a free answer
STEPS = 24  # decode steps that are timed together
STREAMS = 8
SHORTEST = 16  # tokens of the conversation at depth 0
CALLED = "jailbreak"  # whose single calls are timed
WORKS = ("prefill", "decode", "call", "fanout", "chat", "start", "memory")


class Question(NamedTuple):
    """How an intrinsic is asked: behind a conversation come `invocation`, and its answer is `label` or free."""

    invocation: tuple[int, ...]
    label: Label | None


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the report, and what is timed for it.

    The base model has read `warm` before. Timed are the `calls`, all at once; off come those of `less`, timed just
    before; what remains is divided by `steps`. `fresh`: all KV is forgotten before every round, not only the first.
    """

    work: str
    context: int
    calls: tuple[Call, ...]
    warm: tuple[tuple[int, ...], ...] = ()
    less: tuple[Call, ...] = ()
    steps: int = 1
    fresh: bool = True
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def streams(self) -> int:
        return max(1, len(self.warm))

    @property
    def adapted(self) -> bool:
        return any(call.adapter is not None for call in self.calls)


def questions(chat: ChatTokenizer, infos: Mapping[str, AdapterInfo]) -> dict[str, Question]:
    """The six intrinsics. What a label's options share, and what the rewriter's contract forces, no side decodes."""
    found: dict[str, Question] = {}
    for name in INTRINSICS:
        options = getattr(load_contract(infos[name]).constraint(), "options", ())
        opened = chat.encode(OPENING) if name == REWRITE else ()
        found[name] = Question((*infos[name].invocation_tokens, *opened), make_label(chat, options))
    return found


def make_label(chat: ChatTokenizer, options: Sequence[str]) -> Label | None:
    """The label answer with these options, None where there are none."""
    if not options:
        return None
    tokens = [chat.encode(option) for option in options]
    opening, parting = parted(tokens)
    where = {option: token for token, option in parting.items()}
    return Label(tuple(options), opening, tuple(where[option] for option in tokens))


def conversation(chat: ChatTokenizer, tokens: int, number: int = 0) -> tuple[int, ...]:
    """A conversation of that many tokens; those of different numbers part at once, so that they share no KV."""
    # context() wants no more of an engine than its tokenizer.
    engine = cast(Engine, SimpleNamespace(aio=SimpleNamespace(chat=chat)))
    found = context(engine, tokens)
    marks = chat.encode(str(number))
    return (*found[:3], marks[-1], *found[4:]) if number else found


def ask(question: Question, name: str, held: tuple[int, ...]) -> Call:
    """An intrinsic's call on a conversation."""
    tokens = 1 if question.label else FREE
    return Call(name, (*held, *question.invocation), tokens, question.label)


def items(
    chat: ChatTokenizer, asked: Mapping[str, Question], works: Sequence[str], contexts: Sequence[int] | None
) -> list[Item]:
    """All items of these works; `contexts` replaces every work's own."""
    found: list[Item] = []
    if "prefill" in works:
        found += [prefill(chat, n) for n in contexts or PREFILL]
    if "decode" in works:
        found += [decode(chat, n, streams) for streams in (1, STREAMS) for n in contexts or DEPTHS]
    if "call" in works:
        found += [call(chat, asked, n, free) for free in (False, True) for n in contexts or CALLS]
    if "fanout" in works:
        found += [fanout(chat, asked, n) for n in contexts or CALLS]
    return found


def prefill(chat: ChatTokenizer, tokens: int) -> Item:
    return Item("prefill", tokens, (Call(None, conversation(chat, tokens), 1),))


def decode(chat: ChatTokenizer, depth: int, streams: int) -> Item:
    """One step of so many streams: the time of several steps after the first token, divided by their number."""
    prompts = tuple(conversation(chat, max(depth, SHORTEST), number) for number in range(streams))
    return Item(
        f"decode, {streams} stream{'s' if streams > 1 else ''}",
        depth,
        calls=tuple(Call(None, prompt, STEPS + 1) for prompt in prompts),
        warm=prompts,
        less=tuple(Call(None, prompt, 1) for prompt in prompts),
        steps=STEPS,
        fresh=False,
        notes={"streams": streams, "steps": STEPS},
    )


def call(chat: ChatTokenizer, asked: Mapping[str, Question], tokens: int, free: bool) -> Item:
    """The first call of an adapter on a conversation that the base model has read."""
    held = conversation(chat, tokens)
    question = asked[CALLED]
    if free:
        question = question._replace(label=None)
    work = f"call, {FREE} free tokens" if free else "call, label"
    return Item(work, tokens, (ask(question, CALLED, held),), warm=(held,))


def fanout(chat: ChatTokenizer, asked: Mapping[str, Question], tokens: int) -> Item:
    """All six intrinsics on one conversation: five labels, and the rewriter's free tokens."""
    held = conversation(chat, tokens)
    calls = tuple(ask(question, name, held) for name, question in asked.items())
    return Item(f"fan-out of {len(calls)}", tokens, calls, warm=(held,))


def checks(chat: ChatTokenizer, asked: Mapping[str, Question], tokens: int) -> list[tuple[Call, ...]]:
    """Calls whose answers must be the same on every side, in this order, on one conversation.

    The base model's answer; each intrinsic; all six at once; free tokens of one; and the base model once more, which
    must find none of the adapters' KV.
    """
    held = conversation(chat, tokens)
    base = Call(None, (*held, *chat.encode("<|im_start|>assistant\n")), FREE)
    each = [ask(question, name, held) for name, question in asked.items()]
    free = ask(asked[CALLED]._replace(label=None), CALLED, held)
    return [(base,), *((one,) for one in each), tuple(each), (free,), (base,)]
