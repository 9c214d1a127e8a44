"""The linear memory in blocks: running means in fp32, guarded, one prefix state a block.

    n' = n + sum_t w_t,   M' = (n M + sum_t w_t phi(k_t)^T v_t) / n',   z' = (n z + sum_t w_t phi(k_t)) / n'

M/z is the published read (Munkhdalai et al. 2024, eq. 3-4); n M and n z are its sums. The division keeps
every entry at the size of one token's, so that neither length nor dtype can overflow it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.numerics import count_dtype

EMPTY = 1e-9
"""A read's denominator (in units of one token's phi(q).phi(k)) below this counts as an empty memory."""

LARGEST = 1e15
"""Features or values beyond this are not written: products of two of them, summed, must fit fp32."""

TINY = 1e-30
"""Keeps 0 / 0 away where a denominator is 0 only if the numerator is too."""


@dataclass
class Memory:
    """Running means M `[..., F, D]` and z `[..., F]` in fp32, and the weight n `[...]` behind them.

    n is in fp64, exact to 2^53 tokens, where the device has it (`kernels.numerics.count_dtype`).
    """

    M: Tensor
    z: Tensor
    n: Tensor

    @classmethod
    def empty(cls, batch: int, groups: int, features: int, width: int, device: torch.device) -> "Memory":
        """A memory that holds nothing: M `[B, G, F, D]`."""
        return cls(
            torch.zeros(batch, groups, features, width, device=device),
            torch.zeros(batch, groups, features, device=device),
            torch.zeros(batch, groups, device=device, dtype=count_dtype(device)),
        )


def block_updates(phi_k: Tensor, v: Tensor, weight: Tensor, clamp: float) -> tuple[Memory, Tensor]:
    """The mean update of each block, limited.

    Args:
        phi_k: `[B, G, N, S, F]` fp32, finite.
        v: `[B, G, N, S, D]` fp32, finite.
        weight: `[B, G, N, S]`, 0 for what is not written.
        clamp: the largest magnitude an entry of a block's mean update may have; beyond it M and z are scaled
            down together, so that what is read keeps its direction.

    Returns:
        the block means with their weights, and `[B, G, N]` bool, which of them were limited.
    """
    weighted = phi_k * weight.unsqueeze(-1)
    n = weight.sum(-1)
    safe = n.detach().clamp_min(TINY).unsqueeze(-1)
    z = weighted.sum(-2) / safe
    M = (weighted / safe.unsqueeze(-1)).transpose(-1, -2) @ v
    largest = torch.maximum(M.detach().abs().amax((-1, -2)), z.detach().abs().amax(-1))
    scale = (clamp / largest.clamp_min(clamp)).unsqueeze(-1)
    return Memory(M * scale.unsqueeze(-1), z * scale, n), largest > clamp


def write_linear(
    phi_k: Tensor, v: Tensor, weight: Tensor, initial: Memory, clamp: float
) -> tuple[Memory, Tensor]:
    """Prefix states of the linear update: entry i of the result holds `initial` and the first i blocks.

    Args:
        phi_k, v, weight, clamp: as in `block_updates`.
        initial: the memory before the first block, M `[B, G, F, D]`.

    Returns:
        a memory with M `[B, G, N + 1, F, D]`, and `[B, G, N]` bool, which updates were limited.
    """
    update, clamped = block_updates(phi_k, v, weight, clamp)
    counts = torch.cat([initial.n.unsqueeze(-1), update.n.to(initial.n.dtype)], dim=-1)
    n = counts.cumsum(-1)
    # Every read has n in numerator and denominator alike, so no gradient belongs to it.
    own = counts.detach().to(update.M.dtype)
    total = n.detach().to(update.M.dtype).clamp_min(TINY)
    M = torch.cat([initial.M.unsqueeze(2), update.M], dim=2) * own[..., None, None]
    z = torch.cat([initial.z.unsqueeze(2), update.z], dim=2) * own[..., None]
    return Memory(M.cumsum(2) / total[..., None, None], z.cumsum(2) / total[..., None], n), clamped


def write_delta(
    phi_k: Tensor, v: Tensor, weight: Tensor, initial: Memory, clamp: float
) -> tuple[Memory, Tensor]:
    """Prefix states of the delta update as published (Munkhdalai et al. 2024, eq. 5), for reproduction only.

    With z and M as sums and phi the weighted features of the block:
    r_t = phi_t M / (phi_t.z), 0 where the memory is empty;
    M' = M + sum phi_t^T (v_t - r_t); z' = z + sum phi_t.

    Since z grows by the whole of phi where M grows by what was missing only, a pair written again and again
    is read back as v, v/2, v/2, v/2: it settles at half of its value. `write_delta_bounded` does not.

    Shapes as in `write_linear`; the blocks follow one another in a loop, because each reads what the one
    before it wrote.
    """
    M, z, n = initial.M, initial.z, initial.n
    states, clamped = [(M, z, n)], []
    for block in range(phi_k.shape[2]):
        phi, gate = phi_k[:, :, block], weight[:, :, block]
        # M / z is the sums' own quotient, and a weight would be in both: neither n nor weight matters here.
        reach = (phi @ z.unsqueeze(-1)) * (gate > 0).unsqueeze(-1)
        held = reach > TINY
        missing = v[:, :, block] - torch.where(held, phi @ M / torch.where(held, reach, 1), 0)
        update, limited = block_updates(phi.unsqueeze(2), missing.unsqueeze(2), gate.unsqueeze(2), clamp)
        own, new_n = n.detach().to(M.dtype), n + update.n.squeeze(2).to(n.dtype)
        added, total = update.n.squeeze(2).detach(), new_n.detach().to(M.dtype).clamp_min(TINY)
        kept, part = (own / total)[..., None], (added / total)[..., None]
        M = M * kept[..., None] + update.M.squeeze(2) * part[..., None]
        z, n = z * kept + update.z.squeeze(2) * part, new_n
        states.append((M, z, n))
        clamped.append(limited.squeeze(2))
    Ms, zs, ns = zip(*states, strict=True)
    limits = torch.stack(clamped, 2) if clamped else n.new_zeros(*n.shape, 0, dtype=torch.bool)
    return Memory(torch.stack(Ms, 2), torch.stack(zs, 2), torch.stack(ns, 2)), limits


def write_delta_bounded(
    phi_k: Tensor, v: Tensor, weight: Tensor, initial: Memory, clamp: float
) -> tuple[Memory, Tensor]:
    """Prefix states of the bounded delta update: a repeated pair is read back as v, however often it comes.

    With z and M as sums and phi the weighted features of the block:
    gamma_t = clip(1 - phi_t.z / |phi_t|^2, 0, 1); z' = z + sum gamma_t phi_t; r_t = phi_t M / (phi_t.z');
    u_t = min(1, phi_t.z' / sum_j phi_t.phi_j); M' = M + sum phi_t^T u_t (v_t - r_t).

    Shapes as in `write_linear`; the blocks follow one another in a loop, because each reads what the one
    before it wrote.
    """
    n, M, z = initial.n, initial.M, initial.z
    states = [(M, z, n)]
    clamped = []
    for block in range(phi_k.shape[2]):
        phi = phi_k[:, :, block] * weight[:, :, block, :, None]
        written = (weight[:, :, block] > 0).unsqueeze(-1)
        scale = n.detach().to(M.dtype)[..., None]
        sum_M, sum_z = M * scale[..., None], z * scale
        square = phi.square().sum(-1).clamp_min(TINY)
        gamma = (1 - (phi * sum_z.unsqueeze(2)).sum(-1) / square).clamp(0, 1) * written.squeeze(-1)
        new_z = sum_z + (gamma.unsqueeze(-1) * phi).sum(2)
        reach = (phi * new_z.unsqueeze(2)).sum(-1, keepdim=True)
        read = (phi @ sum_M) / reach.clamp_min(TINY)
        crowd = (phi @ phi.transpose(-1, -2)).sum(-1, keepdim=True).clamp_min(TINY)
        share = (reach / crowd).clamp(max=1)
        change = phi.transpose(-1, -2) @ torch.where(written, share * (v[:, :, block] - read), 0)
        count = gamma.sum(-1)
        largest = change.detach().abs().amax((-1, -2)) / count.clamp_min(1)
        limit = (clamp / largest.clamp_min(clamp))[..., None]
        clamped.append(largest > clamp)
        new_n = n + count.to(n.dtype)
        divide = new_n.detach().to(M.dtype).clamp_min(TINY)[..., None]
        M = (sum_M + change * limit[..., None]) / divide[..., None]
        z, n = (sum_z + (new_z - sum_z) * limit) / divide, new_n
        states.append((M, z, n))
    Ms, zs, ns = zip(*states, strict=True)
    limited = torch.stack(clamped, 2) if clamped else n.new_zeros(*n.shape, 0, dtype=torch.bool)
    return Memory(torch.stack(Ms, 2), torch.stack(zs, 2), torch.stack(ns, 2)), limited


def read(phi_q: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of a read.

    Args:
        phi_q: `[B, G, N, Q, F]` fp32, Q queries of one block.
        memory: M `[B, G, N, F, D]`.

    Returns:
        phi(q) M `[B, G, N, Q, D]` and phi(q).z `[B, G, N, Q, 1]`.
    """
    return phi_q @ memory.M, phi_q @ memory.z.unsqueeze(-1)
