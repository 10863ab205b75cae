"""The exception tree. Each error carries the HTTP status and the OpenAI error code a server would answer with.

MidstreamError
├── InputError                  the caller's input is wrong; nothing was run
│   ├── AdapterError            an adapter folder or name
│   │   ├── AdapterFormatError  a folder breaks the format; lists every violation
│   │   └── AdapterNotFound     no adapter of that name is loaded
│   ├── ModelNotFound           a request names neither the base model nor a loaded adapter
│   ├── InvocationError         the prompt lacks the adapter's invocation tokens
│   ├── PromptTooLong           can never fit the context or the KV budget
│   ├── ConstraintError         a grammar, schema or choice list is invalid
│   ├── ContractError           an io.yaml contract is invalid
│   ├── DataError               training or evaluation rows are wrong; lists every bad row
│   ├── ReplayError             a trace cannot be read, or lacks what is asked of it
│   └── ModelError              a model cannot be found, read or served
├── AccessError                 a server turns the caller away
│   ├── Unauthorized            no API key, or a wrong one
│   ├── Forbidden               this key may not do that
│   ├── BodyTooLarge            the request body is over the limit
│   ├── BodyTimeout             the request body did not come
│   └── TooManyStreams          the key has too many requests open
├── OverloadedError             the queue is full
├── DeadlineExceeded            the request's deadline passed
├── BudgetExceeded              a flow has spent the tokens that it may compute
├── Cancelled                   the caller cancelled the request
├── OutputError                 a generated output does not fit its contract
├── RetrievalError              a retriever failed, or gave what cannot be read
├── ForwardFailed               the forward pass of one request failed
├── BackendError                a server that a backend calls cannot be reached or understood
├── Unsupported                 what the backend in use cannot do
└── EngineStopped               the engine was closed or its loop failed
"""

from __future__ import annotations

from collections.abc import Sequence


class MidstreamError(Exception):
    """Root of every error this package raises on purpose."""

    status: int = 500
    code: str = "internal_error"


class InputError(MidstreamError):
    """The caller's input is wrong; nothing was run and no state changed."""

    status = 400
    code = "invalid_request_error"


class AdapterError(InputError):
    """Something is wrong with an adapter folder or an adapter name."""

    code = "invalid_adapter"


class AdapterFormatError(AdapterError):
    """An adapter folder breaks the format. `violations` lists all of them, not just the first."""

    def __init__(self, folder: str, violations: Sequence[str]) -> None:
        self.folder = folder
        self.violations = tuple(violations)
        super().__init__(f"adapter folder {folder} cannot be loaded: " + "; ".join(self.violations))


class AdapterNotFound(AdapterError):
    """No adapter of that name is loaded."""

    status = 404
    code = "adapter_not_found"


class ModelNotFound(InputError):
    """A request names neither the base model nor a loaded adapter."""

    status = 404
    code = "model_not_found"


class InvocationError(InputError):
    """The prompt does not contain the adapter's invocation tokens, so the adapter would never switch on."""

    code = "invocation_missing"


class PromptTooLong(InputError):
    """The request can never fit the model's context or the KV budget."""

    code = "context_length_exceeded"


class ConstraintError(InputError):
    """A grammar, JSON schema, regular expression or choice list is invalid."""

    code = "invalid_constraint"


class ContractError(InputError):
    """An io.yaml contract is invalid or asks for something unknown."""

    code = "invalid_contract"


class DataError(InputError):
    """Training or evaluation rows are wrong. `problems` lists each with its line number."""

    code = "invalid_data"

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(f"{source}: {len(self.problems)} bad rows: " + "; ".join(self.problems))


class ReplayError(InputError):
    """A trace cannot be read, or a replayed run asks for something else than the recorded one did."""

    code = "replay_mismatch"


class ModelError(InputError):
    """A model cannot be found, read, or served by this engine."""

    code = "model_not_supported"


class AccessError(MidstreamError):
    """A server turns the caller away; nothing was run."""


class Unauthorized(AccessError):
    """No API key was sent, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class Forbidden(AccessError):
    """This key may not do that."""

    status = 403
    code = "permission_denied"


class BodyTooLarge(AccessError):
    """The request body is over the limit."""

    status = 413
    code = "body_too_large"


class BodyTimeout(AccessError):
    """The request body did not come in time."""

    status = 408
    code = "request_timeout"


class TooManyStreams(AccessError):
    """The key has too many requests open."""

    status = 429
    code = "too_many_streams"


class OverloadedError(MidstreamError):
    """The request queue is full; try again later."""

    status = 429
    code = "overloaded"


class DeadlineExceeded(MidstreamError):
    """The request's deadline passed before it finished."""

    status = 504
    code = "deadline_exceeded"


class BudgetExceeded(MidstreamError):
    """A flow has spent the tokens that it may compute."""

    status = 429
    code = "budget_exceeded"


class Cancelled(MidstreamError):
    """The caller cancelled the request."""

    status = 499
    code = "cancelled"


class OutputError(MidstreamError):
    """A generated output does not fit its contract."""

    status = 422
    code = "invalid_output"


class RetrievalError(MidstreamError):
    """A retriever failed, or gave what cannot be read as passages."""

    status = 502
    code = "retrieval_failed"


class ForwardFailed(MidstreamError):
    """The forward pass of this request failed; others went on."""

    code = "forward_failed"


class BackendError(MidstreamError):
    """A server that a backend calls cannot be reached, breaks off, or answers what cannot be understood."""

    status = 502
    code = "backend_error"


class Unsupported(MidstreamError):
    """The backend in use cannot do this; another one can."""

    status = 501
    code = "not_supported"


class EngineStopped(MidstreamError):
    """The engine was closed, or its loop failed."""

    status = 503
    code = "engine_stopped"
