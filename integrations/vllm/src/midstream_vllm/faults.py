"""Errors as vLLM's front takes them: midstream's classes, known to vLLM as the client's fault, and their HTTP form."""

from __future__ import annotations

from typing import Any

from pydantic import field_serializer
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.exceptions import VLLMValidationError

from midstream_vllm.core import AdapterFormatError, InputError, InvocationError, MidstreamError


class InvocationMissing(InvocationError, VLLMValidationError):
    """The prompt lacks the adapter's invocation tokens."""


class AdapterRefused(AdapterFormatError, VLLMValidationError):
    """An adapter folder cannot be served; lists every violation."""


class NotServed(InputError, VLLMValidationError):
    """An activated LoRA is asked for together with something that it is not served with."""


class CodedInfo(ErrorInfo):
    """vLLM's error object, whose `code` is the HTTP status that vLLM answers with, and on the wire midstream's code."""

    wire_code: str

    @field_serializer("code")
    def _on_the_wire(self, code: int) -> str:
        return self.wire_code

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return super().model_dump(**{**options, "exclude": {"wire_code"}})


class CodedResponse(ErrorResponse):
    """vLLM's error response with midstream's code in it."""

    error: CodedInfo

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return {**super().model_dump(**options), "error": self.error.model_dump()}


def coded(response: ErrorResponse, error: MidstreamError) -> CodedResponse:
    """vLLM's response to an error of ours, with our code and status."""
    info = CodedInfo(
        message=response.error.message,
        type="BadRequestError" if error.status == 400 else response.error.type,
        param=response.error.param,
        code=error.status,
        wire_code=error.code,
    )
    return CodedResponse(error=info)
