"""Adapters that mlx-lm saved: what they are in PEFT's terms, and what is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.small_adapters import EMBEDDING, HEAD, QUERY, VOCABULARY, WIDTH, make_base
from tests.unit.peft.test_parameters import NUM_EXPERTS, ROUTER, mixture

from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.context import make_context
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import read_normal
from lorax_shard.peft.read import examine
from lorax_shard.peft.verify import verify

RANK, SCALE = 2, 20.0
LAST = "model.layers.1.attn.q_proj"
Tensors = dict[str, torch.Tensor]


def config(**values: Any) -> dict[str, Any]:
    """Return a configuration as mlx-lm writes it; None takes an entry out."""
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    document = {
        "model": "mlx-community/Toy-4bit", "fine_tune_type": "lora", "num_layers": 16,
        "lora_parameters": parameters, "batch_size": 4, "optimizer": "adam", "train": True,
        **values,
    }  # fmt: skip
    return {name: value for name, value in document.items() if value is not None}


def factors(*modules: str, width: tuple[int, int] = (WIDTH, WIDTH)) -> Tensors:
    """Return factors as mlx-lm lays them out: in x rank, and rank x out."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name in modules or (QUERY, LAST):
        found[f"{name}.lora_a"] = torch.randn(width[0], RANK, generator=generator)
        found[f"{name}.lora_b"] = torch.randn(RANK, width[1], generator=generator)
    return found


def write(folder: Path, document: dict[str, Any] | None = None, values: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    told = config() if document is None else document
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(factors() if values is None else values, folder / "adapters.safetensors")
    return folder


def read(folder: Path, **base: Any) -> HostAdapter:
    return examine(folder, make_base(**base), AdapterLimits()).adapter


def refusal(folder: Path, **base: Any) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        read(folder, **base)
    return caught.value.public


def test_a_router_is_a_linear_of_mlx(tmp_path: Path) -> None:
    values = factors(ROUTER, width=(WIDTH, NUM_EXPERTS))
    adapter = examine(write(tmp_path, values=values), mixture(), AdapterLimits()).adapter
    delta = adapter.modules[ROUTER]
    assert delta.a is not None
    assert delta.b is not None
    assert torch.equal(delta.a, values[f"{ROUTER}.lora_a"].T)
    assert torch.equal(delta.b, values[f"{ROUTER}.lora_b"].T)

    values[f"{ROUTER}.m"] = torch.ones(NUM_EXPERTS)
    folder = write(tmp_path / "dora", config(fine_tune_type="dora"), values)
    with pytest.raises(AdapterRefusedError, match="more than A and B for .*gate; of experts and"):
        examine(folder, mixture(), AdapterLimits())


def test_a_linear_adds_what_mlx_adds(tmp_path: Path) -> None:
    values = factors()
    modules = read(write(tmp_path, values=values)).modules
    assert list(modules) == [QUERY, LAST]
    x = torch.randn(5, WIDTH)
    for name, delta in modules.items():
        assert delta.a is not None
        assert delta.b is not None
        # mlx-lm: z = (x @ lora_a) @ lora_b; y + scale * z
        expected = SCALE * ((x @ values[f"{name}.lora_a"]) @ values[f"{name}.lora_b"])
        # The same sums in the same order: not a bit may differ.
        assert torch.equal(delta.scaling * ((x @ delta.a.T) @ delta.b.T), expected)


def test_dora_divides_by_what_mlx_divides_by(tmp_path: Path) -> None:
    values = factors(QUERY) | {f"{QUERY}.m": torch.rand(WIDTH) + 1}
    delta = read(write(tmp_path, config(fine_tune_type="dora"), values)).modules[QUERY]
    assert delta.a is not None
    assert delta.b is not None
    assert delta.magnitude is not None
    # In float64: two ways of writing one formula.
    x, weight = torch.randn(5, WIDTH).double(), torch.randn(WIDTH, WIDTH).double()
    a, b, m = (values[f"{QUERY}.{part}"].double() for part in ("lora_a", "lora_b", "m"))
    # mlx-lm: adapted = w + (scale * lora_b.T) @ lora_a.T; (m / norm(adapted, axis=1)) * out
    norm = torch.linalg.vector_norm(weight + (SCALE * b.T) @ a.T, dim=1)
    expected = (m / norm) * (x @ weight.T + SCALE * ((x @ a) @ b))
    changed = weight + delta.scaling * delta.b.double() @ delta.a.double()
    factor = delta.magnitude / torch.linalg.vector_norm(changed, dim=1)
    assert torch.allclose(factor * (x @ changed.T), expected, rtol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_adds_what_mlx_adds_as_a_head_too(tied: bool, tmp_path: Path) -> None:
    values = factors(EMBEDDING, width=(VOCABULARY, WIDTH))
    modules = read(write(tmp_path, values=values), tied=tied).modules
    assert list(modules) == ([EMBEDDING, HEAD] if tied else [EMBEDDING])
    a, b = values[f"{EMBEDDING}.lora_a"], values[f"{EMBEDDING}.lora_b"]
    delta = modules[EMBEDDING]
    assert delta.a is not None
    assert delta.b is not None
    ids = torch.tensor([3, 19, 0])
    # mlx-lm: scale * (lora_a[x] @ lora_b)
    assert torch.equal(delta.scaling * (delta.a.T[ids] @ delta.b.T), SCALE * (a[ids] @ b))
    if tied:
        head = modules[HEAD]
        assert head.a is not None
        assert head.b is not None
        x = torch.randn(4, WIDTH)
        # as_linear: scale * ((x @ lora_b.T) @ lora_a.T)
        expected = SCALE * ((x @ b.T) @ a.T)
        assert torch.equal(head.scaling * ((x @ head.a.T) @ head.b.T), expected)


def test_what_was_converted_is_loaded_without_the_original(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "normal").mkdir()
    context = make_context(make_base(), AdapterLimits(), "Toy")
    facts = verify(tmp_path, tmp_path / "normal", context)
    assert (facts["max_rank"], facts["num_modules"]) == (RANK, 2)
    assert facts["warnings"] == [
        "it was made for the base model mlx-community/Toy-4bit, and this server has Toy"
    ]
    expected = read(tmp_path)
    (tmp_path / "adapters.safetensors").unlink()
    adapter = read_normal(tmp_path / "normal")
    assert adapter.digest == expected.digest
    for name, delta in adapter.modules.items():
        assert torch.equal(delta.a, expected.modules[name].a)
        assert torch.equal(delta.b, expected.modules[name].b)


@pytest.mark.parametrize(
    "document",
    [
        # Of the last layers: -1, 0 and more than there are mean all.
        config(num_layers=-1),
        config(num_layers=0),
        config(num_layers=2),
        # As early releases called it.
        config(num_layers=None, lora_layers=2),
        config(fine_tune_type=None),
        config(lora_parameters={"rank": 2, "scale": 20, "keys": ["attn.q_proj"]}),
        config(lora_parameters={"rank": 2, "scale": 20, "keys": [QUERY, LAST]}),
        config(lora_parameters={"rank": 2, "scale": 20, "alpha": 2}),
        # Some tools write both vocabularies.
        config(peft_type="LORA", r=2, target_modules=["q_proj"]),
    ],
)
def test_every_spelling_of_the_same_is_read(document: dict[str, Any], tmp_path: Path) -> None:
    adapter = read(write(tmp_path, document))
    assert adapter.digest == read(write(tmp_path / "plain")).digest


def parameters(**values: Any) -> dict[str, Any]:
    return {"lora_parameters": {"rank": RANK, "scale": SCALE, **values}}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full' of mlx-lm is not supported: only lora"),
        ({"lora_parameters": None}, "lora_parameters is missing in adapter_config.json"),
        ({"lora_parameters": []}, "lora_parameters is missing in adapter_config.json"),
        (parameters(rank=0), "rank of adapter_config.json, which mlx-lm wrote, is 0; it must be"),
        (parameters(rank=3), "has the rank 2; adapter_config.json says 3"),
        (parameters(scale=None), "lora_parameters.scale of adapter_config.json is None"),
        (parameters(scale=float("nan")), "it must be a finite number"),
        (
            parameters(alpha=16),
            "write the whole factor as scale (where alpha counted: scale * alpha",
        ),
        ({"num_layers": "8"}, "num_layers of adapter_config.json, which mlx-lm wrote, is '8'"),
        ({"num_layers": 1}, f"it has weights for {QUERY}, which its num_layers and keys leave out"),
        (parameters(keys=["attn.o_proj"]), f"it has weights for {QUERY}, {LAST}, which its"),
        (
            {"fine_tune_type": "dora"},
            f"weights are missing that adapter_config.json asks for: {QUERY} (m",
        ),
    ],
)
def test_configurations_that_are_refused(
    document: dict[str, Any], text: str, tmp_path: Path
) -> None:
    assert text in refusal(write(tmp_path, config(**document)))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({f"{QUERY}.lora_a": torch.ones(WIDTH, RANK)}, f"are missing that {'adapter_config.json'} asks for: {QUERY} (b)"),
        (factors(QUERY, width=(WIDTH, 9)), "has the shape [9, 2], where [6, 2] fits"),
        (factors("layers.0.attn.q_proj"), f"it says layers.0.attn.q_proj where {QUERY} is expected"),
        (factors("language_model.model.layers.0.attn.q_proj"), f"it says language_model.{QUERY} where {QUERY} is expected"),
        (factors() | {f"{QUERY}.weight": torch.ones(6, 6)}, f"other than lora_a, lora_b: {QUERY}.weight"),
        (factors() | {f"{QUERY}.m": torch.ones(6)}, f"other than lora_a, lora_b: {QUERY}.m"),
        ({f"{QUERY}.lora_a": torch.ones(3, 2, 6), f"{QUERY}.lora_b": torch.ones(3, 6, 2)}, "parts of MoE experts"),
        ({}, "lora_b: none at all"),
        ({f"{QUERY}.lora_a": torch.full((6, 2), float("inf")), f"{QUERY}.lora_b": torch.ones(2, 6)}, "NaN or infinite"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(values: Tensors, text: str, tmp_path: Path) -> None:
    assert text in refusal(write(tmp_path, values=values))


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    values = factors(EMBEDDING, width=(VOCABULARY, WIDTH))
    values[f"{EMBEDDING}.m"] = torch.ones(VOCABULARY)
    text = refusal(write(tmp_path, config(fine_tune_type="dora"), values))
    assert "which mlx-lm computes by rows and PEFT by columns; mlx_lm.fuse makes a model" in text


def test_a_head_of_its_own_is_refused_where_the_model_has_none(tmp_path: Path) -> None:
    write(tmp_path, values=factors(HEAD, width=(WIDTH, VOCABULARY)))
    assert list(read(tmp_path).modules) == [HEAD]
    assert "it was made for a model with a head of its own" in refusal(tmp_path, tied=True)


def test_a_scale_of_nothing_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path, config(lora_parameters={"rank": 2, "scale": 0}))
    examined = examine(tmp_path, make_base(), AdapterLimits())
    assert examined.warnings == ("the scale is 0: it adds nothing",)
