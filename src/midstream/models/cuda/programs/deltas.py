"""Triton programs of adapters' low-rank deltas for a few rows: down to the rank, and up to the output.

A table of factors has, for each part of a product and each adapter of the step, four int64: the addresses of A
[rank, in] and B [out, rank], multiples of 16, the rank, a multiple of 8 (0: the adapter has no such layer), and its
scale as the bits of a float64. So what is launched depends on no adapter: a recorded step serves any, once the table
is filled.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["factors", "owners", "parts"])
def shrink_row(
    x,  # [rows, in_features]
    factors,  # [parts, ADAPTERS, 4]
    owners,  # int64 [rows]: the row's adapter, -1 for the base model
    parts,  # int64 [parts, 3]: number, first column, columns
    low,  # float32 [rows, parts, rank_block]
    in_features,
    rank_block,
    ADAPTERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """scale · A x of one row for one part of the product, BLOCK_R of its numbers."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    owner = tl.load(owners + row)
    if owner >= 0:
        factor = factors + (tl.load(parts + part * 3) * ADAPTERS + owner) * 4
        rank = tl.multiple_of(tl.load(factor + 2).to(tl.int32), 8)
        r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        if tl.program_id(2) * BLOCK_R < rank:
            a = tl.multiple_of(tl.load(factor).to(tl.pointer_type(x.dtype.element_ty)), 16)
            scale = tl.load(factor + 3).to(tl.float64, bitcast=True).to(tl.float32)
            i = tl.arange(0, BLOCK_IN)
            total = tl.zeros((BLOCK_R,), tl.float32)
            for at in range(0, in_features, BLOCK_IN):
                there = at + i < in_features
                numbers = tl.load(x + row * in_features + at + i, mask=there, other=0.0).to(tl.float32)
                mask = (r < rank)[:, None] & there[None, :]
                weights = tl.load(a + r[:, None] * in_features + at + i[None, :], mask=mask, other=0.0)
                total += tl.sum(weights.to(tl.float32) * numbers[None, :], 1)
            tl.store(low + (row * tl.num_programs(1) + part) * rank_block + r, total * scale)


@triton.jit(do_not_specialize_on_alignment=["factors", "owners", "parts"])
def expand_block(
    y,  # [rows, width], to which the deltas are added
    factors,
    owners,
    parts,
    low,
    width,
    rank_block,
    ADAPTERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """B times what `shrink_row` found, for BLOCK_OUT columns of one part and row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    owner = tl.load(owners + row)
    if owner >= 0:
        factor = factors + (tl.load(parts + part * 3) * ADAPTERS + owner) * 4
        rank = tl.multiple_of(tl.load(factor + 2).to(tl.int32), 8)
        columns = tl.load(parts + part * 3 + 2).to(tl.int32)
        o = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        if (rank > 0) & (tl.program_id(2) * BLOCK_OUT < columns):
            b = tl.multiple_of(tl.load(factor + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
            found = low + (row * tl.num_programs(1) + part) * rank_block
            delta = tl.zeros((BLOCK_OUT,), tl.float32)
            for at in range(0, rank, BLOCK_R):
                r = at + tl.arange(0, BLOCK_R)
                numbers = tl.load(found + r, mask=r < rank, other=0.0)
                mask = (o < columns)[:, None] & (r < rank)[None, :]
                weights = tl.load(b + o[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
                delta += tl.sum(weights * numbers[None, :], 1)
            target = y + row * width + tl.load(parts + part * 3 + 1) + o
            total = tl.load(target, mask=o < columns, other=0.0).to(tl.float32) + delta
            tl.store(target, total.to(y.dtype.element_ty), mask=o < columns)
