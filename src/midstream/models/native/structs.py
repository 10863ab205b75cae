"""The kernels' arguments, field by field as the C++ headers have them."""

from __future__ import annotations

import ctypes


class KV(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


class Attention(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("kv", KV),
        *((name, ctypes.c_void_p) for name in ("out", "scratch")),
        *((name, ctypes.c_void_p) for name in ("chunks", "rows", "merge_rows", "merge_first", "merge_partial")),
        *((name, ctypes.c_void_p) for name in ("blocks", "spans")),
        *((name, ctypes.c_int64) for name in ("num_chunks", "num_merged", "num_blocks", "batch_rows", "slots")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("residual", "update", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "dim")),
        ("alpha", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


class Rotary(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cosine", "sine", "query")),
        ("kv", KV),
        ("write", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "dim", "slots")),
    )


class Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias", "scales")),
        *((name, ctypes.c_int64) for name in ("in_", "out", "wide")),
    )


class Factor(ctypes.Structure):
    _fields_ = (
        ("b", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("depth", "out", "offset", "down")),
        ("scale", ctypes.c_float),
    )


class Factors(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class Owned(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int64), ("end", ctypes.c_int64), ("products", ctypes.c_void_p))


class Deltas(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("owned", "down")),
        *((name, ctypes.c_int64) for name in ("num_owned", "down_width")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm")),
        *((name, Weight) for name in ("qkv", "o", "gate_up", "down")),
        ("first_eps", ctypes.c_float),
        ("second_eps", ctypes.c_float),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "normed", "update", "qkv", "query", "attended", "both", "gated")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "write", "layers", "kv", "attention")),
        ("deltas", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "rows", "hidden", "heads", "kv_heads", "dim", "slots")),
        ("width", ctypes.c_int64),
        ("residual_scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )
