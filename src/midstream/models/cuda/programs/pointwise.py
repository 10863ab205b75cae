"""Triton programs of what stands between a layer's matrix products. All compute in float32."""

import triton
import triton.language as tl


@triton.jit
def norm_row(x, update, weight, out, alpha, eps, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Root-mean-square norm of one row; with ADD, alpha · update is first added to it in place."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    there = d < DIM
    numbers = tl.load(x + row * row_stride + d, mask=there, other=0.0).to(tl.float32)
    if ADD:
        numbers += alpha * tl.load(update + row * DIM + d, mask=there, other=0.0).to(tl.float32)
        rounded = numbers.to(x.dtype.element_ty)
        tl.store(x + row * row_stride + d, rounded, mask=there)
        numbers = rounded.to(tl.float32)  # what the next layer reads is what is normed here
    share = tl.rsqrt(tl.sum(numbers * numbers, 0) / DIM + eps)
    scaled = numbers * share * tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + d, scaled.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize_on_alignment=["slots"], do_not_specialize=["rows"])
def rotate_head(
    qkv,  # [rows, (heads + 2 kv_heads) · 2 HALF]
    cosine,  # [rows, 2 HALF]
    sine,
    query,  # [HEADS, rows, 2 HALF]
    keys,  # [KV_HEADS, slots, 2 HALF]
    values,
    slots,  # int64 [rows]
    rows,
    cosine_stride,
    sine_stride,
    kv_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one row: queries and keys turned by their position, keys and values put into the row's slot."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    there = i < HALF
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + i
    first = tl.load(source, mask=there, other=0.0)
    second = tl.load(source + HALF, mask=there, other=0.0)
    slot = tl.load(slots + row)
    if head >= HEADS + KV_HEADS:
        target = values + (head - HEADS - KV_HEADS).to(tl.int64) * kv_head_stride + slot * 2 * HALF + i
        tl.store(target, first, mask=there)
        tl.store(target + HALF, second, mask=there)
    else:
        # Both halves of a row of cosines, and of sines, are the same.
        c = tl.load(cosine + row * cosine_stride + i, mask=there, other=0.0).to(tl.float32)
        s = tl.load(sine + row * sine_stride + i, mask=there, other=0.0).to(tl.float32)
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        turned_first = (a * c - b * s).to(qkv.dtype.element_ty)
        turned_second = (b * c + a * s).to(qkv.dtype.element_ty)
        if head < HEADS:
            target = query + (head.to(tl.int64) * rows + row) * 2 * HALF + i
            tl.store(target, turned_first, mask=there)
            tl.store(target + HALF, turned_second, mask=there)
        else:
            target = keys + (head - HEADS).to(tl.int64) * kv_head_stride + slot * 2 * HALF + i
            tl.store(target, turned_first, mask=there)
            tl.store(target + HALF, turned_second, mask=there)


@triton.jit
def gate_block(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) · up for BLOCK columns of one row of [rows, 2 WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    gate = tl.load(both + row * 2 * WIDTH + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=there)
