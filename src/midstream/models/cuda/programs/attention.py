"""Triton programs of attention over extents of the KV pool: one kernel for prefill and decode, and one that merges.

Pointers to tables are to int64, as models/cuda/tables.py lays them out; partial results are float32, log-sum-exps to
the base of two.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["tiles", "entries"])
def attend_tile(
    query,  # [heads, rows, DIM], strides given, numbers of a vector side by side
    keys,  # [kv_heads, slots, DIM]
    values,
    out,  # DIRECT: [rows, HEADS, DIM]; else float32 [entries, HEADS, DIM]
    lse,  # [entries, HEADS]; not written where DIRECT
    tiles,
    entries,
    head_stride,
    row_stride,
    kv_head_stride,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile for one KV head: its rows' query vectors against its keys, block after block.

    Query vector m is that of the tile's row m // GROUP and of head m % GROUP of the KV head's group.
    """
    tile = tiles + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    first = tl.load(tile)
    count = tl.load(tile + 1).to(tl.int32)
    low = tl.load(tile + 2)
    full = (tl.load(tile + 3) - low).to(tl.int32)
    high = (tl.load(tile + 4) - low).to(tl.int32)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    place = m // GROUP
    head = kv_head * GROUP + m % GROUP
    live = place < count
    entry = first + place
    row = tl.load(entries + entry * 3, mask=live, other=0)
    begin = (tl.load(entries + entry * 3 + 1, mask=live, other=0) - low).to(tl.int32)
    end = (tl.load(entries + entry * 3 + 2, mask=live, other=0) - low).to(tl.int32)
    there = live[:, None] & (d < DIM)[None, :]
    q = tl.load(query + (head * head_stride + row * row_stride)[:, None] + d[None, :], mask=there, other=0.0)

    offset = kv_head.to(tl.int64) * kv_head_stride + low * DIM
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Keys that all rows see, then those that only some do or that end within a block.
    result, highest, total = _read_keys(
        q, keys + offset, values + offset, result, highest, total, begin, end, scale, 0, full, high,
        DIM, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    result, highest, total = _read_keys(
        q, keys + offset, values + offset, result, highest, total, begin, end, scale, full, high, high,
        DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    divisor = tl.where(total > 0.0, total, 1.0)
    result = result / divisor[:, None]
    if DIRECT:
        target = row * HEADS + head
    else:
        target = entry * HEADS + head
        tl.store(lse + target, tl.where(total > 0.0, highest + tl.log2(divisor), float("-inf")), mask=live)
    tl.store(out + target[:, None] * DIM + d[None, :], result.to(out.dtype.element_ty), mask=there)


@triton.jit
def _read_keys(
    q, keys, values, result, highest, total, begin, end, scale, first, last, high,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `first` to `last`, counted from the tile's lowest slot."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    within = (d < DIM)[None, :]
    for at in range(first, last, BLOCK_N):
        key = at + n
        place = key[:, None] * DIM + d[None, :]
        # Slots behind the last one hold anything, not-a-numbers too: they are not read, not only weighed by zero.
        there = within & (key < high)[:, None] if MASKED else within
        if MASKED or DIM != BLOCK_D:
            k = tl.load(keys + place, mask=there, other=0.0)
            v = tl.load(values + place, mask=there, other=0.0)
        else:
            k = tl.load(keys + place)
            v = tl.load(values + place)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        found = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet: any finite number keeps its weights zeros.
        origin = tl.where(found == float("-inf"), 0.0, found)
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(highest - origin)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION)
        highest = found
    return result, highest, total


@triton.jit(do_not_specialize_on_alignment=["merge_first", "merge_entries"])
def merge_row(
    partial,  # float32 [entries, HEADS, DIM]
    lse,
    out,  # [rows, HEADS, DIM]
    merge_first,
    merge_entries,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One row and head: its entries' results, weighed by their log-sum-exps; zeros where it has none."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(merge_first + row).to(tl.int32)
    last = tl.load(merge_first + row + 1).to(tl.int32)
    e = tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    result = tl.zeros((BLOCK_D,), tl.float32)
    highest = float("-inf")
    total = 0.0
    for at in range(first, last, BLOCK_E):
        there = at + e < last
        place = tl.load(merge_entries + at + e, mask=there, other=0) * HEADS + head
        weight = tl.load(lse + place, mask=there, other=float("-inf"))
        found = tl.maximum(highest, tl.max(weight, 0))
        origin = tl.where(found == float("-inf"), 0.0, found)
        weight = tl.exp2(weight - origin)
        shrink = tl.exp2(highest - origin)
        mask = there[:, None] & (d < DIM)[None, :]
        part = tl.load(partial + place[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        result = result * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = found
    result = result / tl.where(total > 0.0, total, 1.0)
    target = (row.to(tl.int64) * HEADS + head) * DIM + d
    tl.store(out + target, result.to(out.dtype.element_ty), mask=d < DIM)
