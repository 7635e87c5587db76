"""Triton kernel of `sample`: one program per row, which it reads a few times and never sorts.

top_k and top_p each keep the logits from some value on: the k-th largest, or the largest from which on the mass is
reached. Floats are ordered as the integers of their bits are (`_key`), so that value is found digit by digit, from
the highest: of sixteen numbers that differ in one digit, the largest with enough tokens, or mass, at or above it.
Each digit takes one pass over the row. That is exact whatever the row holds, needs neither candidates nor memory,
and gives the host nothing to look at. Logits of 16 bits are told apart by fewer digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_DIGIT_BITS = 4
# The highest bits of a float32 that tell values of these dtypes apart: sign, exponent and their mantissa.
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


@triton.jit
def _read(logits_ptr, allowed_ptr, start, vocab_size, HAS_ALLOWED: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a row: −inf where no token may be chosen, +inf where there is no number."""
    columns = start + tl.arange(0, BLOCK)
    mask = columns < vocab_size
    x = tl.load(logits_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    if HAS_ALLOWED:
        word = tl.load(allowed_ptr + columns // 32, mask=mask, other=0)
        x = tl.where((word >> (columns % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def _key(x, KEY_BITS: tl.constexpr):
    """Integers in the order of x, of which the highest KEY_BITS bits are kept."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # the two zeros are one
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - KEY_BITS)


@triton.jit
def _weigh(x, temperature, top, floor):
    """The likeliest token weighs 1."""
    scaled = tl.div_rn(x, temperature)
    return tl.where(scaled < floor, 0.0, tl.exp(scaled - top))


@triton.jit
def _find_key(
    logits_ptr,  # [V]
    allowed_ptr,  # [words], or unused
    vocab_size,
    temperature,
    top,
    floor,
    wanted,
    BY_WEIGHT: tl.constexpr,  # else by number
    HAS_ALLOWED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key from which on tokens have the wanted weight, or number."""
    found = tl.full([], -(1 << (KEY_BITS - 1)), dtype=tl.int32)
    for done in range(DIGIT_BITS, KEY_BITS + 1, DIGIT_BITS):
        keys = found + (tl.arange(0, 1 << DIGIT_BITS) << (KEY_BITS - done))
        sums = tl.zeros([1 << DIGIT_BITS, BLOCK], dtype=tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = _read(logits_ptr, allowed_ptr, start, vocab_size, HAS_ALLOWED, BLOCK)
            share = _weigh(x, temperature, top, floor) if BY_WEIGHT else tl.full([BLOCK], 1.0, tl.float32)
            sums += tl.where(_key(x, KEY_BITS)[None, :] >= keys[:, None], share[None, :], 0.0)
        reached = tl.sum(sums.to(tl.float64), 1) >= wanted
        found = tl.max(tl.where(reached, keys, found), 0)
    return found


@triton.jit
def _invert(weights, wanted, SIZE: tl.constexpr):
    """The first place where the running sum exceeds `wanted`; whatever is rounded, one that has weight."""
    places = tl.arange(0, SIZE)
    exceeds = (tl.cumsum(weights, 0) > wanted) & (weights > 0)
    first = tl.min(tl.where(exceeds, places, SIZE), 0)
    return tl.minimum(first, tl.max(tl.where(weights > 0, places, 0), 0))


# Whether columns of a table lie on 16 bytes depends on the number of rows: it shall not compile anew for that.
@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "points_ptr"]
)
def _sample_kernel(
    logits_ptr,  # [n, V]
    allowed_ptr,  # [n, words] int32, or unused
    temperature_ptr,  # [n] float64
    top_k_ptr,  # [n] int64
    top_p_ptr,  # [n] float64
    min_p_ptr,  # [n] float64
    points_ptr,  # [n] float64
    tokens_ptr,  # [n] int64
    logits_stride,
    allowed_stride,
    vocab_size,
    HAS_ALLOWED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,  # divides KEY_BITS
    BLOCK: tl.constexpr,
    NUM_TILES: tl.constexpr,  # a power of two, ≥ vocab_size / BLOCK
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    allowed_ptr += row * allowed_stride

    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    places = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _read(logits_ptr, allowed_ptr, start, vocab_size, HAS_ALLOWED, BLOCK)
        places = tl.where(x > best, start + tl.arange(0, BLOCK), places)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    is_finite = (top > float("-inf")) & (top < float("inf"))
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if (temperature <= 0.0) | (not is_finite):
        likeliest = tl.min(tl.where(best == top, places, vocab_size), 0)
        tl.store(tokens_ptr + row, tl.where(is_finite, likeliest, -1))
        return

    top = tl.div_rn(top, temperature)
    min_p = tl.load(min_p_ptr + row)
    floor = tl.full([], float("-inf"), dtype=tl.float32)
    if min_p > 0.0:
        floor = top + tl.log(min_p).to(tl.float32)  # in float64, where the logarithm of 1 is 0
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    least = tl.full([], -(1 << (KEY_BITS - 1)), dtype=tl.int32)
    if (top_k > 0) & (top_k < vocab_size):
        least = _find_key(
            logits_ptr,
            allowed_ptr,
            vocab_size,
            temperature,
            top,
            floor,
            top_k,
            False,
            HAS_ALLOWED,
            KEY_BITS,
            DIGIT_BITS,
            BLOCK,
        )
    if top_p < 1.0:
        # Of ties of the last of top_k, only as many count as it takes to make k.
        above = tl.zeros([BLOCK], dtype=tl.float32)
        last = tl.zeros([BLOCK], dtype=tl.float32)
        num_above = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, vocab_size, BLOCK):
            x = _read(logits_ptr, allowed_ptr, start, vocab_size, HAS_ALLOWED, BLOCK)
            weights = _weigh(x, temperature, top, floor)
            is_above = _key(x, KEY_BITS) > least
            above += tl.where(is_above, weights, 0.0)
            last = tl.maximum(last, tl.where(is_above, 0.0, weights))
            num_above += is_above.to(tl.int32)
        num_last = tl.maximum(top_k - tl.sum(num_above, 0), 0)
        mass = tl.sum(above.to(tl.float64), 0) + num_last * tl.max(last, 0).to(tl.float64)
        least_of_p = _find_key(
            logits_ptr,
            allowed_ptr,
            vocab_size,
            temperature,
            top,
            floor,
            top_p * mass,
            True,
            HAS_ALLOWED,
            KEY_BITS,
            DIGIT_BITS,
            BLOCK,
        )
        least = tl.maximum(least, least_of_p)

    tiles = tl.arange(0, NUM_TILES)
    sums = tl.zeros([NUM_TILES], dtype=tl.float64)
    for start in range(0, vocab_size, BLOCK):
        x = _read(logits_ptr, allowed_ptr, start, vocab_size, HAS_ALLOWED, BLOCK)
        weights = tl.where(_key(x, KEY_BITS) >= least, _weigh(x, temperature, top, floor), 0.0)
        sums = tl.where(tiles == start // BLOCK, tl.sum(weights.to(tl.float64), 0), sums)
    wanted = tl.load(points_ptr + row) * tl.sum(sums, 0)
    tile = _invert(sums, wanted, NUM_TILES)
    x = _read(logits_ptr, allowed_ptr, tile * BLOCK, vocab_size, HAS_ALLOWED, BLOCK)
    weights = tl.where(_key(x, KEY_BITS) >= least, _weigh(x, temperature, top, floor), 0.0)
    wanted -= tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
    token = tile * BLOCK + _invert(weights.to(tl.float64), wanted, BLOCK)
    tl.store(tokens_ptr + row, token)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    points: Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.sample`."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    _sample_kernel[(num_rows,)](
        logits,
        tokens if allowed is None else allowed,
        temperature,
        top_k,
        top_p,
        min_p,
        points,
        tokens,
        logits.stride(0),
        0 if allowed is None else allowed.stride(0),
        vocab_size,
        HAS_ALLOWED=allowed is not None,
        KEY_BITS=_KEY_BITS[logits.dtype],
        DIGIT_BITS=_DIGIT_BITS,
        BLOCK=block,
        NUM_TILES=triton.next_power_of_2(triton.cdiv(vocab_size, block)),
        num_warps=max(1, block // 128),
    )
    return tokens
