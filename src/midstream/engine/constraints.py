"""Constrained decoding: which tokens may come next, which are forced, and when the output is whole.

Forced runs are appended without a decode step each (jump-forward). A choice is a trie of its options' tokens, so
the probability of a label is read off the forward in which the options part. Regular expressions and JSON schemas
are left to llguidance.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from midstream.errors import ConstraintError
from midstream.types import Choice, Constraint, JsonSchema, Regex

Encode = Callable[[str], Sequence[int]]

_MAX_CHOICE_TOKENS = 65_536


class Matcher(Protocol):
    """The state of one constrained output."""

    def forced(self) -> list[int]:
        """Tokens that must come next, now accepted. Empty where the model has a choice."""
        ...

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits [vocab] with everything not allowed at -inf; may note probabilities from them first."""
        ...

    def accept(self, token: int) -> None:
        """Take a sampled token."""
        ...

    @property
    def finished(self) -> bool:
        """The output is whole and nothing may follow."""
        ...

    def probabilities(self) -> dict[str, float] | None:
        """Probability of each option, where the constraint has options and the output decided them all."""
        ...


@dataclass(slots=True)
class _TrieNode:
    """`option` ends here; `count` options end here or below, and `sole` is one of them."""

    option: str | None = None
    children: dict[int, _TrieNode] = field(default_factory=dict)
    count: int = 0
    sole: str = ""


class ChoiceMatcher:
    """One of some strings. An option that another one continues is ended by the end-of-sequence token."""

    def __init__(self, root: _TrieNode, eos: int) -> None:
        self._node = root
        self._eos = eos
        self._ended = False
        self._branch: dict[int, float] = {}
        self._probabilities: dict[str, float] = {}
        self._undecided = False
        self._mass = 1.0

    def forced(self) -> list[int]:
        run: list[int] = []
        while len(self._node.children) == 1 and self._node.option is None:
            token, self._node = next(iter(self._node.children.items()))
            run.append(token)
        return run

    def restrict(self, logits: Tensor) -> Tensor:
        allowed = list(self._node.children)
        if self._node.option is not None:
            allowed.append(self._eos)
        index = torch.tensor(allowed, device=logits.device)
        kept = logits.index_select(0, index)
        self._note(allowed, torch.softmax(kept.float(), dim=0).tolist())
        return torch.full_like(logits, float("-inf")).index_copy_(0, index, kept)

    def accept(self, token: int) -> None:
        if token == self._eos and self._node.option is not None:
            self._settle(self._node.option, self._branch[token])
            self._ended = True
            return
        for sibling, share in self._branch.items():
            if sibling != token:
                self._settle_sibling(sibling, share)
        self._mass *= self._branch[token]
        self._node = self._node.children[token]

    @property
    def finished(self) -> bool:
        return self._ended or not self._node.children

    def probabilities(self) -> dict[str, float] | None:
        if self._undecided or not self.finished:
            return None
        result = dict(self._probabilities)
        if self._node.option is not None and not self._ended:
            result[self._node.option] = self._mass
        return result

    def _note(self, allowed: list[int], shares: list[float]) -> None:
        self._branch = dict(zip(allowed, shares, strict=True))

    def _settle(self, option: str, share: float) -> None:
        for sibling, other in self._branch.items():
            if sibling != self._eos:
                self._settle_sibling(sibling, other)
        self._probabilities[option] = self._mass * share

    def _settle_sibling(self, token: int, share: float) -> None:
        if token == self._eos and self._node.option is not None:
            self._probabilities[self._node.option] = self._mass * share
            return
        below = self._node.children[token]
        if below.count == 1:
            self._probabilities[below.sole] = self._mass * share
        else:
            # Several options part further on, on a way that was not taken: their shares are unknown.
            self._undecided = True


class GrammarMatcher:
    """A regular expression or JSON schema, compiled by llguidance."""

    def __init__(self, matcher: LLMatcher, eos: Sequence[int]) -> None:
        self._matcher = matcher
        self._eos = frozenset(eos)
        self._ended = False

    def forced(self) -> list[int]:
        if self.finished:
            return []
        tokens = [token for token in self._matcher.compute_ff_tokens() if token not in self._eos]
        if tokens and not self._matcher.consume_tokens(tokens):
            raise ConstraintError(f"the grammar failed: {_reason(self._matcher)}")
        return tokens

    def restrict(self, logits: Tensor) -> Tensor:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: logits.shape[0]].astype(bool)
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar failed: {_reason(self._matcher)}")
        allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits)
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        if token in self._eos:
            self._ended = True
            return
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"the grammar failed: {_reason(self._matcher)}")

    @property
    def finished(self) -> bool:
        return self._ended or self._matcher.is_stopped()

    def probabilities(self) -> None:
        return None


class ConstraintCompiler:
    """Makes matchers; the tokenizer's grammar tables are built at the first use and kept."""

    def __init__(self, tokenizer: Any, encode: Encode, eos: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._encode = encode
        self._eos = tuple(eos)
        self._vocab_size = vocab_size
        self._built: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint, max_tokens: int) -> Callable[[], Matcher]:
        """What makes fresh matchers, one for each branch. May be called from several threads.

        Raises ConstraintError when the constraint is invalid or cannot be met within `max_tokens`.
        """
        if isinstance(constraint, Choice):
            return self._choice(constraint, max_tokens)
        return self._grammar(constraint)

    def _choice(self, constraint: Choice, max_tokens: int) -> Callable[[], Matcher]:
        if any(not option for option in constraint.options):
            raise ConstraintError("choice: an option is empty")
        root = _TrieNode()
        size = 0
        for option in dict.fromkeys(constraint.options):
            node = root
            tokens = self._encode(option)
            size += len(tokens)
            if size > _MAX_CHOICE_TOKENS:
                raise ConstraintError(f"choice: the options have more than {_MAX_CHOICE_TOKENS} tokens in all")
            if len(tokens) > max_tokens:
                raise ConstraintError(f"choice {option!r} is {len(tokens)} tokens long but max_tokens is {max_tokens}")
            for token in tokens:
                node = node.children.setdefault(token, _TrieNode())
                node.count, node.sole = node.count + 1, option
            node.option = option
        return lambda: ChoiceMatcher(root, self._eos[0])

    def _grammar(self, constraint: Regex | JsonSchema) -> Callable[[], Matcher]:
        matcher = LLMatcher(self._tables(), _grammar_text(constraint), log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{constraint.kind}: {_reason(matcher)}")
        return lambda: GrammarMatcher(matcher.deep_copy(), self._eos)

    def _tables(self) -> LLTokenizer:
        with self._lock:
            if self._built is None:
                self._built = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=list(self._eos))
            return self._built


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, without the dump of the parser's state behind it."""
    return str(matcher.get_error()).split("\n", 1)[0]


def _grammar_text(constraint: Regex | JsonSchema) -> str:
    if isinstance(constraint, Regex):
        return LLMatcher.grammar_from_regex(constraint.pattern)
    try:
        schema = json.loads(constraint.schema_text)
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    except (ValueError, TypeError) as error:
        raise ConstraintError(f"json_schema: {error}") from error
