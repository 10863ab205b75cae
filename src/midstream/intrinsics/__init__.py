"""Intrinsics: adapters with a typed input and output, called as functions."""

from midstream.intrinsics.call import IntrinsicResult, call_intrinsic, call_intrinsics
from midstream.intrinsics.constraint import constraint_of_schema
from midstream.intrinsics.library import (
    Answerability,
    Certainty,
    Hallucination,
    Jailbreak,
    QueryRewrite,
    RequirementCheck,
    answerability,
    certainty,
    hallucination,
    jailbreak,
    query_rewrite,
    requirement_check,
)
from midstream.intrinsics.process import process_reply
from midstream.intrinsics.rewrite import rewrite_body
from midstream.intrinsics.spec import Contract, load_contract

__all__ = [
    "Answerability",
    "Certainty",
    "Contract",
    "Hallucination",
    "IntrinsicResult",
    "Jailbreak",
    "QueryRewrite",
    "RequirementCheck",
    "answerability",
    "call_intrinsic",
    "call_intrinsics",
    "certainty",
    "constraint_of_schema",
    "hallucination",
    "jailbreak",
    "load_contract",
    "process_reply",
    "query_rewrite",
    "requirement_check",
    "rewrite_body",
]
