"""The kernels' arguments, field by field as the C++ headers have them."""

from __future__ import annotations

import ctypes


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "scratch")),
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
        ("threads", ctypes.c_int32),
    )


class Rotary(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cosine", "sine", "query", "keys", "values", "write")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "dim", "slots")),
        ("threads", ctypes.c_int32),
    )


class Factor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b_t")),
        *((name, ctypes.c_int64) for name in ("rank", "out", "offset")),
        ("scale", ctypes.c_double),
    )


class Owned(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("start", "end", "first", "count"))


class Deltas(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "owned", "factors")),
        *((name, ctypes.c_int64) for name in ("num_owned", "in_", "width")),
        ("threads", ctypes.c_int32),
    )
