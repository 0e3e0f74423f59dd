"""Named low-rank adapters on one frozen base: several networks in little more than one's memory.

    y = W x + b + (alpha / rank) up down x      a pair (down, up) for each adapted Linear and name

An adapter is asked for by name (`Context.adapter`), as data: no network has an active adapter, so
that a checkpointed block computes the same again in backward, whatever was called in between. The
layers that are adapted are those of the released recipe (docs/method.md, Recipe); the compressed
patch embedding is small and is replaced as a whole.

Legend:  D_in, D_out widths of a Linear   R rank
"""
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import nn

TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "ffn.up", "ffn.down",
           "time_embed.up", "time_embed.down", "r_embed.up", "r_embed.down")
REPLACED = ("far_patch_embed",)
# What teacher and fake score leave as it is: they know one time, and whole clips.
SCORE = ("r_embed", "far_patch_embed")
# An adapter of this name is part of the base: frozen, and added in every call (model.Linear).
BELOW = "below"


class LowRank(nn.Module):
    """x (..., D_in) -> (alpha / rank) up down x (..., D_out)."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, scale: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, dim_in))
        self.up = nn.Parameter(torch.empty(dim_out, rank))
        self.scale = scale

    def forward(self, x):
        x = nnf.linear(x, self.down.to(x.dtype))                 # (..., R)
        return self.scale * nnf.linear(x, self.up.to(x.dtype))


def add_adapter(network: nn.Module, name: str, rank: int, alpha: float, without=()) -> None:
    """Give a FlowMapDiT an adapter, its tensors uninitialised. without: parts that it leaves as
    they are, see SCORE."""
    for path, module in list(network.named_modules()):
        if path.startswith(tuple(without)):
            continue
        if path.endswith(TARGETS):
            dims = module.in_features, module.out_features
            module.adapters[name] = LowRank(*dims, rank, alpha / rank)
        elif path in REPLACED:
            dim, channels = module.weight.shape[:2]
            module.adapters[name] = type(module)(channels, module.patch, dim)


class Adapted:
    """A network that shares its base with others: called like FlowMapDiT, it asks the base with its
    adapter. Its parameters are those of the adapter, under the names that they have in a file."""

    def __init__(self, network: nn.Module, name: str):
        self.network, self.name = network, name

    def __call__(self, z, t, r, context):
        return self.network(z, t, r, replace(context, adapter=self.name))

    def encode(self, z, context, compressed: bool = False):
        return self.network.encode(z, replace(context, adapter=self.name), compressed)

    def named_parameters(self):
        infix = f".adapters.{self.name}."
        return [(name.replace(infix, "."), p) for name, p in self.network.named_parameters()
                if infix in name]

    def parameters(self):
        return [p for _, p in self.named_parameters()]

    def requires_grad_(self, on: bool = True) -> "Adapted":
        for p in self.parameters():
            p.requires_grad_(on)
        return self


def fresh_adapter(adapter: Adapted, base: Mapping, generator_of) -> dict:
    """What makes each first tensor of an adapter of a network with tensors `base`, which starts as
    its base: down uniform within 1 / sqrt(D_in), from the torch.Generator generator_of(name); up
    zero; a replaced tensor as the base's."""
    def make(name, shape):
        if name in base:
            return base[name].float()
        value = torch.zeros(shape)
        if name.endswith(".down"):
            value.uniform_(-1, 1, generator=generator_of(name)).div_(shape[1] ** 0.5)
        return value
    return {name: partial(make, name, p.shape) for name, p in adapter.named_parameters()}


def merged(base: Mapping, adapter: Mapping, scale: float) -> dict:
    """What makes each tensor of a network without adapters that equals `base` with the adapter:
    W + scale up down, in fp32, because a bf16 W lies on a grid that is coarser than most of what an
    adapter adds. scale: alpha / rank; -alpha / rank takes out again what was merged."""
    def make(name):
        path = name.removesuffix(".weight")
        if name in adapter:
            return adapter[name]
        if f"{path}.down" not in adapter:
            return base[name]
        down, up = adapter[f"{path}.down"].float(), adapter[f"{path}.up"].float()
        return base[name].float() + scale * (up @ down)
    return {name: partial(make, name) for name in base}


def stacked(first: Mapping, second: Mapping, ratio: float) -> dict:
    """What makes each tensor of one adapter, of both ranks together and second's scale, that adds
    what two add: `second` on a base that is itself `first` on a base. ratio: first's scale over
    second's. A replaced tensor is second's."""
    def make(name):
        if name.endswith(".down"):
            return torch.cat([first[name], second[name]])                    # (R, D_in)
        if name.endswith(".up"):
            return torch.cat([ratio * first[name], second[name]], 1)         # (D_out, R)
        return second[name]
    return {name: partial(make, name) for name in second}
