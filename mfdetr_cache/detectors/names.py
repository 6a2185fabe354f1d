"""Translation of parameter names between the checkpoints of one code and the classes of another."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A pattern and what takes its place, one after the other. Braces in the last name split a packed
# tensor: "self_attn.{q,k,v}_proj" takes three equal parts along the first axis.
Rules = Sequence[tuple[str, str]]
Translation = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Marks:
    """Names by which a state dict is told: it has all of some, and none of others."""

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def __call__(self, tensors: Container[str]) -> bool:
        """Whether a state dict is of the kind."""
        return all(k in tensors for k in self.has) and not any(k in tensors for k in self.lacks)


def translate(keys: Iterable[str], rules: Rules) -> Translation:
    r"""Names in the model for each name in a checkpoint, several for a packed tensor.

    All rules are applied to every name in order.

    >>> translate(["mlp.w12.bias"], [(r"mlp\.w12", "mlp.{gate,up}")])
    {'mlp.w12.bias': ('mlp.gate.bias', 'mlp.up.bias')}
    """
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    found: Translation = {}
    for key in keys:
        name = key
        for pattern, new in compiled:
            name = pattern.sub(new, name)
        packed = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
        parts = [] if packed is None else [packed[1] + p + packed[3] for p in packed[2].split(",")]
        found[key] = tuple(parts) or (name,)
    return found


def carry(tensors: Mapping[str, Tensor], names: Translation) -> dict[str, Tensor]:
    """A state dict of the model: a checkpoint's tensors, renamed, packed ones split."""
    carried: dict[str, Tensor] = {}
    for key, targets in names.items():
        pieces = tensors[key].chunk(len(targets)) if len(targets) > 1 else (tensors[key],)
        carried.update(zip(targets, pieces, strict=True))
    return carried


def carry_back(
    tensors: Mapping[str, Tensor], names: Translation, original: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inverse of :func:`carry`: a state dict in the authors' layout, on the CPU.

    Tensors of ``original`` that are not in ``names`` are kept.
    """
    changed = {
        key: torch.cat([tensors[t].detach().cpu() for t in targets])
        if len(targets) > 1
        else tensors[targets[0]].detach().cpu().clone()
        for key, targets in names.items()
    }
    return {key: changed.get(key, value) for key, value in original.items()}


def count(keys: Iterable[str], pattern: str) -> int:
    """Number of layers, blocks or heads: 1 + the largest index in names; 0 for none.

    ``pattern`` matches the beginning of a name and has one group of digits.
    """
    compiled = re.compile(pattern)
    return max((int(m[1]) for key in keys if (m := compiled.match(key))), default=-1) + 1
