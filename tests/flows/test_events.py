"""What a run keeps of its calls."""

from __future__ import annotations

from midstream.errors import ForwardFailed
from midstream.flows.events import NO_USAGE, Call, total
from midstream.types import Completion, CompletionChoice, InvokedCall, Request, Score, Usage

REQUEST = Request(prompt=(1, 2))


def test_the_usage_of_a_call_has_the_adapters_that_its_answer_invoked() -> None:
    own, invoked = Usage(9, 4, 0, 5, 7, 3), Usage(12, 10, 0, 2, 1, 1)
    call = InvokedCall(
        adapter="certainty",
        start=2,
        end=4,
        text="7",
        token_ids=(7,),
        finish_reason="stop",
        probabilities=None,
        usage=invoked,
        seconds=0.1,
    )
    choices = (CompletionChoice(0, "a", (1,), "stop", calls=(call, call)), CompletionChoice(1, "b", (2,), "stop"))
    completion = Completion("r", choices, own, (1, 2), None, None, 0.2)
    assert Call("think", REQUEST, completion).usage == total([own, invoked, invoked]) == Usage(33, 24, 0, 9, 9, 5)
    assert Call("think", REQUEST, completion).as_dict()["text"] == ["a", "b"]


def test_a_call_that_failed_has_no_usage_and_says_why() -> None:
    failed = Call("think", REQUEST, ForwardFailed("it broke"))
    assert failed.usage == NO_USAGE
    assert failed.as_dict()["error"] == {"code": "forward_failed", "message": "it broke"}
    scored = Call("score", REQUEST, Score(((-1.0,),), Usage(2, 1, 0, 1, 0, 1), None, 0.1), ((3,),))
    assert scored.usage.computed_tokens == 1
    assert "text" not in scored.as_dict()
