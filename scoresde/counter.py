"""Random numbers by counting: word n of a stream is a function of its key and of n, with no state between them.

    w = philox(counter, key)      four words of 32 bits from a counter of four and a key of two

is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as easy as 1, 2, 3"), here in whole
tensors of int64, whose products hold those of two words. Ten rounds, of each two products,

    (a, b, c, d) <- (hi(M_1 c) ^ b ^ k_0, lo(M_1 c), hi(M_0 a) ^ d ^ k_1, lo(M_0 a)),    k <- k + (W_0, W_1)

mix key and counter so that no test of randomness is known to tell neighbouring ones apart. A number of a sample depends
on the sample's key, the stream, the draw, and its place among the sample's own: not on the batch, its size or padding,
nor on the device (of normal numbers to the rounding of its functions in float64).

`derived` is numpy's `SeedSequence` (O'Neill, 2015, "Developing a seed_seq alternative"), a hash that makes unrelated
seeds of related ones, for many at once: constants and mixing as in numpy, which promises to keep them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["derived", "normal", "philox", "words"]

Uint = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
Words = tuple[Tensor, Tensor, Tensor, Tensor]
_LOW = 2**32 - 1
_M = (0xD2511F53, 0xCD9E8D57)
_W = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four words, int64 in [0, 2^32), of counters and keys of any shapes that broadcast.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, (zero, zero))]  # as the authors have it
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = a * _M[0], c * _M[1]  # 64 bits, of which the sign is one
        a, b = (q >> 32).bitwise_and_(_LOW) ^ (b ^ k0), q.bitwise_and_(_LOW)
        c, d = (p >> 32).bitwise_and_(_LOW) ^ (d ^ k1), p.bitwise_and_(_LOW)
        k0, k1 = (k0 + _W[0]) & _LOW, (k1 + _W[1]) & _LOW
    return a, b, c, d


def words(key: Tensor, stream: int, draw: int, n: int) -> Tensor:
    """n words of each sample, shape (B, 4, ceil(n / 4)), of which word i is [:, i % 4, i // 4].

    Args:
        key: one per sample, int64 in [0, 2^63), shape (B,).
        stream, draw: which of its numbers, each in [0, 2^32).
        n: how many, at most 2^34.
    """
    block = torch.arange(-(-n // 4), device=key.device)
    b, c, d = (torch.full_like(block[:1], number) for number in (draw, stream, 0))
    low, high = (key & _LOW)[:, None], (key >> 32)[:, None]
    return torch.stack(philox((block, b, c, d), (low, high)), 1)


def normal(key: Tensor, stream: int, draw: int, n: int, dtype: torch.dtype) -> Tensor:
    """n standard normal numbers of each sample, shape (B, n), by Box and Muller's pairs: r cos, r sin with
    r^2 = -2 log u. u has 32 bits, so that no number is beyond 6.7 (3e-11 of them would be).
    """
    u = words(key, stream, draw, n).to(torch.float32 if key.device.type == "mps" else torch.float64)
    radius = u[:, ::2].add(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = u[:, 1::2].mul(2 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], 2)  # (B, 2, 2, blocks)
    return pairs.flatten(1, 2).mT.flatten(1)[:, :n].to(dtype)


def derived(seeds: Uint, key: Uint) -> Uint:
    """SeedSequence(seed, spawn_key=(key,)).generate_state(1, uint64) of each, uint64.

    Args:
        seeds: uint64, in one dimension; key: uint32, likewise. They broadcast.

    >>> int(derived(np.array([7], np.uint64), np.array([3], np.uint32))[0])
    6823953754371609207
    """
    zero, factor = np.zeros(1, np.uint32), 0x43B0D7E5

    def hashed(word: Uint) -> Uint:
        nonlocal factor
        word = word ^ np.uint32(factor)
        factor = factor * 0x931E8875 & _LOW
        word = word * np.uint32(factor)
        return word ^ word >> np.uint32(16)

    def mixed(x: Uint, y: Uint) -> Uint:
        word = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
        return word ^ word >> np.uint32(16)

    pool = [hashed(word) for word in (seeds.astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32), zero, zero)]
    for i in range(4):
        for j in range(4):
            if i != j:
                pool[j] = mixed(pool[j], hashed(pool[i]))
    pool = [mixed(word, hashed(key)) for word in pool]
    factor, halves = 0x8B51F9DD, list[Uint]()
    for i in range(2):
        word = pool[i] ^ np.uint32(factor)
        factor = factor * 0x58F38DED & _LOW
        word = word * np.uint32(factor)
        halves.append((word ^ word >> np.uint32(16)).astype(np.uint64))
    return halves[0] | halves[1] << np.uint64(32)
