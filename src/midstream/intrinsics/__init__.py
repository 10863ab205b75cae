"""Intrinsics: adapters with a typed input and output, called as functions."""

from midstream.intrinsics.call import IntrinsicResult, call_intrinsic, call_intrinsics
from midstream.intrinsics.spec import Contract, load_contract

__all__ = ["Contract", "IntrinsicResult", "call_intrinsic", "call_intrinsics", "load_contract"]
