"""Where the modules of a mixture of experts keep what adapters change.

transformers stacks the matrices of all experts of a block in two parameters of one module, and
says by attributes of the module how they lie. A router is a module with a weight that it
multiplies its input with.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Each token goes to all experts, multiplied by its weight for them, which is mostly 0.
_REPEATED = "Llama4TextExperts"
# transformers sets these where it lets others compute the experts.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True, slots=True)
class ExpertsLayout:
    """How a module keeps the matrices of its experts."""

    # The parameters: experts x out x in each, or experts x in x out.
    up: str
    down: str
    is_in_first: bool
    # It gets the tokens once for each expert, one after the other.
    is_repeated: bool = False

    def widths(self, module: nn.Module, name: str) -> tuple[int, int, int]:
        """Return experts, in and out of one of the parameters."""
        experts, one, other = module.get_parameter(name).shape
        return (experts, one, other) if self.is_in_first else (experts, other, one)


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """Return how a module keeps its experts; None: it has none that can be adapted."""
    if type(module).__name__ == _REPEATED:
        return ExpertsLayout("gate_up_proj", "down_proj", is_in_first=True, is_repeated=True)
    if not all(hasattr(module, mark) for mark in _MARKS):
        return None
    up = "gate_up_proj" if module.has_gate else "up_proj"
    own = dict(module.named_parameters(recurse=False))
    if any(name not in own or own[name].dim() != 3 for name in (up, "down_proj")):
        return None
    return ExpertsLayout(up, "down_proj", is_in_first=bool(module.is_transposed))


def is_router(module: nn.Module) -> bool:
    """Return whether a module chooses experts by a weight (experts x in) of its own."""
    weight = getattr(module, "weight", None)
    is_named = type(module).__name__.endswith("Router")
    return is_named and isinstance(weight, nn.Parameter) and weight.dim() == 2
