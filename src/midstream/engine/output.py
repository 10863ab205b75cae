"""From sampled tokens to text: growing a branch's output, stop strings, and pieces for streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from midstream.engine.request import Branch
from midstream.types import CompletionChoice, Delta, TokenLogprob

Decode = Callable[[Sequence[int]], str]

_INCOMPLETE = "�"


class OutputWriter:
    """Takes a branch's tokens one by one, decides when it is finished, and cuts its text at stop strings."""

    def __init__(self, decode: Decode, eos: frozenset[int], token_text: Callable[[int], str]) -> None:
        self._decode = decode
        self._eos = eos
        self._token_text = token_text

    def take(self, branch: Branch, token: int) -> None:
        """Append a token to the output. Sets `finish` where the branch ends with it."""
        params = branch.job.params
        branch.output.append(token)
        ends = self._ends(branch, token)
        if not ends:
            self._write(branch)
        if branch.stop_at is not None or ends:
            branch.finish = "stop"
        elif len(branch.output) >= params.max_tokens:
            branch.finish = "length"
        if branch.finish is not None and branch.stop_at is None:
            self._flush(branch)

    def _ends(self, branch: Branch, token: int) -> bool:
        """Whether a token is the end. Where a constraint says when the answer is whole, that cannot be ignored."""
        return token in self._eos and not (branch.job.params.ignore_eos and branch.matcher is None)

    def finish_whole(self, branch: Branch) -> None:
        """End a branch whose constraint is met."""
        if branch.finish is None or branch.finish == "length":
            branch.finish = "stop"
            self._flush(branch)

    def cut(self, branch: Branch) -> None:
        """End a branch that has no room for what must come next."""
        if branch.finish is None:
            branch.finish = "length"
            self._flush(branch)

    def insert(self, branch: Branch, tokens: Sequence[int]) -> None:
        """Put an invoked adapter's tokens into the output; the base model's own text begins anew after them.

        Neither end-of-sequence tokens nor stop strings are looked for in them.
        """
        branch.output.extend(tokens)
        if branch.job.params.logprobs:
            branch.logprobs.extend(TokenLogprob(token, 0.0) for token in tokens)
        branch.text += self._undecoded(branch, branch.output)
        branch.decoded_to = branch.own_from = len(branch.output)
        branch.own_text_from = len(branch.text)

    def without_end(self, branch: Branch) -> tuple[int, ...]:
        """The output, but for an end-of-sequence token that ended it."""
        tokens = tuple(branch.output)
        return tokens[:-1] if tokens and self._ends(branch, tokens[-1]) else tokens

    def pending(self, branch: Branch) -> Delta | None:
        """What has come since the last call and can no longer be part of a stop string."""
        safe = len(branch.text)
        if branch.finish is None:
            safe -= _held_back(branch.text[branch.own_text_from :], branch.job.params.stop)
        tokens = tuple(branch.output[branch.emitted_tokens :])
        text = branch.text[branch.emitted_chars : safe]
        if not text and not tokens:
            return None
        logprobs = tuple(map(self._with_text, branch.logprobs[branch.emitted_tokens :]))
        branch.emitted_chars = max(branch.emitted_chars, safe)
        branch.emitted_tokens = len(branch.output)
        return Delta(branch.index, text, tokens, logprobs)

    def choice(self, branch: Branch) -> CompletionChoice:
        """A finished branch as a caller sees it."""
        assert branch.finish is not None
        assert branch.finish != "scored"
        return CompletionChoice(
            index=branch.index,
            text=branch.text,
            token_ids=tuple(branch.output),
            finish_reason=branch.finish,
            logprobs=tuple(map(self._with_text, branch.logprobs)) if branch.job.params.logprobs else None,
            probabilities=branch.matcher.probabilities() if branch.matcher is not None else None,
            calls=tuple(branch.calls),
        )

    def _with_text(self, found: TokenLogprob) -> TokenLogprob:
        top = tuple(replace(other, text=self._token_text(other.token_id)) for other in found.top)
        return replace(found, text=self._token_text(found.token_id), top=top)

    def _write(self, branch: Branch) -> None:
        """Decode what is new. Bytes of a character that is not whole yet wait for its other tokens."""
        new = self._undecoded(branch, branch.output)
        if new.endswith(_INCOMPLETE):
            return
        self._add_text(branch, new, len(branch.output))

    def _flush(self, branch: Branch) -> None:
        tokens = self.without_end(branch)
        if branch.decoded_to < len(tokens):
            self._add_text(branch, self._undecoded(branch, tokens), len(tokens))

    def _undecoded(self, branch: Branch, tokens: Sequence[int]) -> str:
        """The text of the tokens that are not decoded yet, in the light of some before them."""
        context = max(0, branch.decoded_to - 4)
        before = self._decode(tokens[context : branch.decoded_to])
        if before.endswith(_INCOMPLETE):  # written as it is, so that nothing can join it any more
            return self._decode(tokens[branch.decoded_to :])
        return self._decode(tokens[context:])[len(before) :]

    def _add_text(self, branch: Branch, text: str, decoded_to: int) -> None:
        branch.text += text
        branch.decoded_to = decoded_to
        self._cut_at_stop(branch)

    def _cut_at_stop(self, branch: Branch) -> None:
        start = branch.own_text_from
        found = [at for stop in branch.job.params.stop if (at := branch.text.find(stop, start)) >= 0]
        if found:
            branch.stop_at = min(found)
            branch.text = branch.text[: branch.stop_at]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if stop.startswith(text[-length:]):
                longest = length
                break
    return longest
