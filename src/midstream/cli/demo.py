"""`midstream demo`: a real conversation over real documents, with adapters called on it as it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from midstream.cli.common import Dtype, Json, Model, open_engine, print_json, show_progress
from midstream.errors import InputError, MidstreamError
from midstream.models.source import DEFAULT_MODEL
from midstream.types import Document

if TYPE_CHECKING:
    from midstream.intrinsics.call import IntrinsicResult
    from midstream.session import Conversation, Engine

_ADAPTERS = ("answerability", "jailbreak")
_ANSWER_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Way:
    """One way of making the same call."""

    way: str
    adapter: str
    result: IntrinsicResult

    def as_dict(self) -> dict[str, Any]:
        return {"way": self.way, "adapter": self.adapter, **self.result.as_dict()}


def demo(model: Model = DEFAULT_MODEL, dtype: Dtype = None, as_json: Json = False) -> None:
    """Chat over documents with the base model, call trained adapters on the conversation, and compare their cost."""
    console = Console(quiet=as_json, highlight=False)
    started = time.perf_counter()
    with open_engine(model, None, dtype, progress=show_progress(as_json)) as engine:
        _require_adapters(engine)
        console.print(f"[dim]{model} loaded with {len(engine.adapters())} adapters in {_since(started)}[/]")
        conversation = engine.conversation()
        first_token: list[float] = []
        turns = _turns()
        for number, (question, documents) in enumerate(turns, 1):
            console.rule(f"turn {number}")
            conversation.user(question, documents)
            shown = f" [dim](with {len(documents)} passages)[/]" if documents else ""
            console.print(f"[bold]user[/] {escape(question)}{shown}")
            if number < len(turns):
                _call_live(console, conversation)
            _answer(console, conversation, lambda: first_token.append(time.perf_counter() - started))
        ways = _compare(engine, conversation)
        console.rule(f"the same calls on this conversation of {len(conversation.token_ids)} tokens, three ways")
        console.print(_table(ways))
        console.print(
            "[dim]shared: aLoRA on what the base model computed; own: the plain LoRA's first call; "
            "empty: the aLoRA re-reading everything[/]"
        )
        _summary(console, ways)
    if as_json:
        print_json({"first_token_s": first_token[0], "calls": [way.as_dict() for way in ways]})


def _turns() -> list[tuple[str, list[Document]]]:
    content = json.loads((files("midstream") / "data" / "demo_chat.json").read_text(encoding="utf-8"))
    return [(t["user"], [Document.model_validate(d) for d in t["documents"]]) for t in content["turns"]]


def _require_adapters(engine: Engine) -> None:
    needed = {name for base in _ADAPTERS for name in (base, f"{base}-lora")}
    missing = sorted(needed - {info.name for info in engine.adapters()})
    if missing:
        raise InputError(
            f"the demo needs the adapters {', '.join(missing)} of library/{engine.aio.model_name}: "
            "run it from a checkout, or point MIDSTREAM_LIBRARY at one"
        )


def _call_live(console: Console, conversation: Conversation) -> None:
    for name, result in zip(_ADAPTERS, conversation.call_many(_ADAPTERS), strict=True):
        if isinstance(result, MidstreamError):
            raise result
        console.print(f"  [cyan]{name}[/] {_described(result)}", soft_wrap=True)


def _answer(console: Console, conversation: Conversation, on_first: Callable[[], None]) -> None:
    console.print("[bold]assistant[/] ", end="")

    def show(text: str) -> None:
        on_first()
        console.print(escape(text), end="", soft_wrap=True)

    reply = conversation.reply(on_text=show, max_tokens=_ANSWER_TOKENS)
    usage = reply.completion.usage
    console.print(f"\n  [dim]{usage.cached_tokens} tokens reused, {usage.computed_tokens} computed[/]")


def _compare(engine: Engine, conversation: Conversation) -> list[Way]:
    """Each adapter for the first time on the whole conversation, as an aLoRA, as a plain LoRA, and re-reading all."""
    warm = [Way("shared", name, conversation.call(name)) for name in _ADAPTERS]
    twins = [Way("own", f"{name}-lora", conversation.call(f"{name}-lora")) for name in _ADAPTERS]
    cold: list[Way] = []
    for name in _ADAPTERS:
        engine.clear_cache()
        cold.append(Way("empty", name, conversation.call(name)))
    return [way for group in zip(warm, twins, cold, strict=True) for way in group]


def _table(ways: list[Way]) -> Table:
    table = Table("adapter", "cache", "result", "reused", "computed", "fwd", "ms", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for way in ways:
        usage = way.result.usage
        share = (way.result.probabilities or {}).get(way.result.result, float("nan"))
        table.add_row(
            way.adapter,
            way.way,
            f"{way.result.result} {share:.2f}",
            str(usage.cached_tokens),
            str(usage.computed_tokens),
            str(usage.forwards),
            f"{way.result.seconds * 1e3:.0f}",
        )
    return table


def _summary(console: Console, ways: list[Way]) -> None:
    for warm, twin, cold in zip(ways[::3], ways[1::3], ways[2::3], strict=True):
        console.print(
            f"{warm.adapter}: {twin.result.seconds / warm.result.seconds:.0f} times faster than the plain LoRA, "
            f"{cold.result.seconds / warm.result.seconds:.0f} times faster than re-reading"
        )


def _described(result: IntrinsicResult) -> str:
    shares = ", ".join(f"{label} {share:.2f}" for label, share in (result.probabilities or {}).items())
    usage = result.usage
    return (
        f"{result.result} [dim]({shares}; {usage.cached_tokens} reused, {usage.computed_tokens} computed, "
        f"{usage.forwards} forward{'s' if usage.forwards != 1 else ''}, {result.seconds * 1e3:.0f} ms)[/]"
    )


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
