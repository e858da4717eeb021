"""Random numbers keyed by what they are for, never drawn from a shared generator in hook order.

Loss hooks fire in the reverse order of the forward passes, and a user's own draws come in between: a key makes the
samples of a criterion call the same whether micro-batches are accumulated or summed, and after a resume.
"""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A fresh generator on `device` seeded by a hash of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)  # a seed is a signed 64-bit number
    return generator
