"""What an adapter sees of the base model, by the task that it was trained for.

An adapter names modules as the class has them that PEFT wrapped: a classifier's backbone has a
prefix (``bert.encoder…``) and a head beside it, an extractor of features is the backbone itself.
Here one backbone serves adapters of all tasks, with a head for each kind. So the base is shown to
an adapter as its own class would be, and what it changes is then called as it is called here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.base import BaseDescription, HeadDescription, ModuleInfo
from lorax_shard.peft.errors import AdapterRefusedError

# The kind of head that a task has.
HEADS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "tokens"}
# Of these heads the pooler is a part.
_POOLED = "sequence"
_POOLER = "pooler"


@dataclass(frozen=True, slots=True)
class SeenBase:
    """The base as the adapters of a task see it."""

    base: BaseDescription
    # What modules are called here, by their names there.
    served: Mapping[str, str]
    # The kind of the head that they have; "": none.
    head: str = ""

    def renamed(self, adapter: HostAdapter) -> HostAdapter:
        """Return an adapter with the names that modules have here."""
        modules = {self.served.get(name, name): delta for name, delta in adapter.modules.items()}
        return dataclasses.replace(adapter, modules=modules, head=self.head)


def seen_base(base: BaseDescription, task: str | None) -> SeenBase:
    """Return what the adapters of a task see; raises AdapterRefusedError if it is not served."""
    if task in HEADS:
        return _with_head(base, str(task), HEADS[str(task)])
    if base.is_backbone and task == "CAUSAL_LM":
        raise AdapterRefusedError(
            f"task_type CAUSAL_LM does not fit: this server's base model is a {base.architecture}, "
            "which generates no text"
        )
    if not base.is_backbone and task == "FEATURE_EXTRACTION":
        return _backbone(base)
    return SeenBase(base, _served_pooler(base))


def _with_head(base: BaseDescription, task: str, kind: str) -> SeenBase:
    head = base.heads.get(kind)
    if head is None:
        raise AdapterRefusedError(
            f"task_type {task} is not served: this server's base model, a {base.architecture}, has "
            "no classification head of this kind"
        )
    served = dict(_backbone_names(base, head))
    modules = {seen: _seen(base, seen, name) for seen, name in served.items()}
    served = {seen: _served(base, name) for seen, name in served.items()}
    for name, info in head.modules.items():
        modules[name], served[name] = info, f"{kind}_head.{name}"
    return SeenBase(_renamed(base, modules, served, head), served, kind)


def _backbone_names(base: BaseDescription, head: HeadDescription) -> Iterator[tuple[str, str]]:
    """Yield what the class calls each module of the backbone, and the description does."""
    inside = f"{head.prefix}."
    for name in base.modules:
        if name.split(".")[0] == _POOLER and not head.has_pooler:
            continue
        if base.is_backbone:
            yield inside + name, name
        elif name == head.prefix or name.startswith(inside):
            yield name, name


def _backbone(base: BaseDescription) -> SeenBase:
    """Return a decoder without its head, as its backbone's class names it."""
    head = next(iter(base.heads.values()), None)
    if head is None:
        raise AdapterRefusedError(
            "task_type FEATURE_EXTRACTION is not served: nothing is known of the backbone of this "
            f"server's base model, a {base.architecture}; train the adapter for CAUSAL_LM"
        )
    inside = f"{head.prefix}."
    served = {n.removeprefix(inside): n for n in base.modules if n.startswith(inside)}
    modules = {seen: _seen(base, seen, name) for seen, name in served.items()}
    return SeenBase(_renamed(base, modules, served, None), served)


def _seen(base: BaseDescription, seen: str, name: str) -> ModuleInfo:
    """Return what a module is, with the prefix of its name on its older names too."""
    info = base.modules[name]
    added = seen.removesuffix(name) if len(seen) > len(name) else ""
    gone = name.removesuffix(seen) if len(name) > len(seen) else ""
    return dataclasses.replace(
        info, older=tuple(added + each.removeprefix(gone) for each in info.older)
    )


def _served(base: BaseDescription, name: str) -> str:
    return _served_pooler(base).get(name, name)


def _served_pooler(base: BaseDescription) -> dict[str, str]:
    """Return what the modules of a pooler are called, which is the head's here."""
    head = base.heads.get(_POOLED)
    if head is None or not head.has_pooler:
        return {}
    return {
        name: f"{_POOLED}_head.{name}" for name in base.modules if name.split(".")[0] == _POOLER
    }


def _renamed(
    base: BaseDescription,
    modules: Mapping[str, ModuleInfo],
    served: Mapping[str, str],
    head: HeadDescription | None,
) -> BaseDescription:
    seen = {name: each for each, name in served.items()}
    return dataclasses.replace(
        base,
        architecture=base.architecture if head is None else head.architecture,
        modules=modules,
        tied=tuple(group for each in base.tied if len(group := _known(each, seen)) > 1),
        input_embedding=seen.get(base.input_embedding, ""),
        output_head=seen.get(base.output_head, ""),
        weight_digests={
            seen[name]: digest for name, digest in base.weight_digests.items() if name in seen
        },
        scores=head,
    )


def _known(group: tuple[str, ...], seen: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(seen[name] for name in group if name in seen)


def refuse_headless(adapter: HostAdapter, head: HeadDescription | None) -> None:
    """Refuse an adapter that brings no head where the base has none either.

    Its modules have the names of its class.
    """
    if head is None or head.facts is not None:
        return
    lacking = [
        name
        for name, info in head.modules.items()
        if info.replaceable
        and (name not in adapter.modules or adapter.modules[name].weight is None)
    ]
    if lacking:
        raise AdapterRefusedError(
            f"it brings no weights for {', '.join(lacking)}, and this server's base model has no "
            f"classification head of its own; name the head in modules_to_save"
        )
