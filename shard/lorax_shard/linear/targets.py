"""The linears of a model: where they hang and what they compute with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lorax_shard.linear.interface import LinearKernel
from lorax_shard.linear.packed import PackedLinear, SiblingGroup, SiblingKernel

# Linears of one parent module that read the same tensor.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class LinearTarget(NamedTuple):
    """A linear of the model: where it hangs and what it computes with."""

    # Its place in the model, such as model.layers.0.mlp.up_proj.
    path: str
    parent: nn.Module
    name: str
    weight: torch.Tensor  # out x in
    bias: torch.Tensor | None
    # Another module uses the same weight (a tied head): it stays in memory in any case.
    is_tied: bool
    # The model's own weight is in x out (Conv1D).
    is_transposed: bool


def find_targets(model: nn.Module) -> Iterator[LinearTarget]:
    """Yield the model's linears in its own order."""
    uses = Counter(id(parameter) for _, parameter in _all_parameters(model))
    for place, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            # Subclasses of nn.Linear compute something else and stay.
            if type(child) is nn.Linear:
                weight = child.weight.detach()
            elif _is_conv1d(child):
                weight = child.get_parameter("weight").detach().t()
            else:
                continue
            parameters = dict(child.named_parameters(recurse=False))
            bias = parameters["bias"].detach() if "bias" in parameters else None
            is_tied = uses[id(parameters["weight"])] > 1
            path = f"{place}.{name}" if place else name
            yield LinearTarget(path, parent, name, weight, bias, is_tied, _is_conv1d(child))


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's linear, which keeps its weight as in x out; known by name, so that this room
    # does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def find_groups(
    targets: list[LinearTarget], siblings: Sequence[tuple[str, ...]]
) -> Iterator[list[LinearTarget]]:
    """Yield siblings together and all other targets alone; empties ``targets``."""
    targets.reverse()
    while targets:
        first = targets.pop()
        group = [first]
        names = next((names for names in siblings if first.name in names), ())
        # The linears of one parent follow each other.
        while targets and not first.is_tied and _are_siblings(first, targets[-1], names):
            group.append(targets.pop())
        yield group


def _are_siblings(first: LinearTarget, other: LinearTarget, names: Sequence[str]) -> bool:
    return (
        other.parent is first.parent
        and other.name in names
        and not other.is_tied
        and other.weight.shape[1] == first.weight.shape[1]
    )


def put_kernel(target: LinearTarget, kernel: LinearKernel) -> None:
    """Put a linear that computes with ``kernel`` into the place of the model's own."""
    out_features, in_features = target.weight.shape
    module = PackedLinear(kernel, in_features, out_features, target.bias)
    module.is_transposed = target.is_transposed
    setattr(target.parent, target.name, module)


def put_stacked(group: Sequence[LinearTarget], kernel: LinearKernel) -> None:
    """Put siblings into their places that share ``kernel``, made of their stacked weights."""
    sizes = [target.weight.shape[0] for target in group]
    siblings = SiblingGroup(kernel, sizes)
    for index, target in enumerate(group):
        put_kernel(
            target, SiblingKernel(siblings, index, kernel.nbytes * sizes[index] // sum(sizes))
        )


def stacked_bias(group: Sequence[LinearTarget]) -> torch.Tensor | None:
    """Return the biases of siblings one behind the other; None where there is none."""
    if all(target.bias is None for target in group):
        return None
    return torch.cat(
        [
            target.weight.new_zeros(target.weight.shape[0]) if target.bias is None else target.bias
            for target in group
        ]
    )
