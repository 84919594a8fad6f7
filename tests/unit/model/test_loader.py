"""What load_paged_model refuses, and in which words."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.linear.quantized.kernel import load_quantized
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.probe import ModelProbe


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def load(folder: Path, **values: Any) -> HFPagedModel:
    values = {"attention_backend": "sdpa", "linear_backend": "torch", **values}
    return load_paged_model(
        ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///none"], **values)
    )


def test_the_threads_are_as_before_whether_it_loads_or_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    real = ModelProbe.record_stock
    monkeypatch.setattr(
        ModelProbe,
        "record_stock",
        lambda probe: (seen.append(torch.get_num_threads()), real(probe)),
    )
    try:
        load(folder)
        assert (seen, torch.get_num_threads()) == ([1], 2)
        monkeypatch.setattr(ModelProbe, "_difference", lambda *_: "planted")
        refusal(folder, ExitCode.MODEL_MISMATCH)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


def refusal(folder: Path, code: ExitCode, **values: Any) -> str:
    with pytest.raises(StartupError) as caught:
        load(folder, **values)
    assert caught.value.exit_code is code
    return str(caught.value)


def edit_json(path: Path, **values: Any) -> None:
    document = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def test_facts_of_a_loaded_model(llama: Path) -> None:
    model = load(llama)
    assert model.model_type == "llama"
    assert model.vocab_size == 384
    assert model.max_positions == 512
    assert model.window_size is None
    assert model.dtype is torch.float32
    assert model.eos_token_ids == {0, 2}
    assert model.attention_backend == "sdpa"
    stored = sum(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert stored <= model.weight_bytes < stored + 100  # and a small RoPE buffer
    assert model.block_bytes(16) == 16 * 2 * (2 * 8 + 2 * 8) * 4


def test_window_is_reported_when_every_layer_has_one(tmp_path: Path) -> None:
    assert load(make_tiny_model("mistral", tmp_path / "m")).window_size == 9
    assert load(make_tiny_model("gemma2", tmp_path / "g")).window_size is None


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 9]}, {7, 9}), ({"eos_token_id": None}, {0})],
)
def test_eos_is_a_number_or_a_list_or_the_configs(
    folder: Path, generation: dict[str, Any], expected: set[int]
) -> None:
    edit_json(folder / "generation_config.json", **generation)
    assert load(folder).eos_token_ids == expected


def test_eos_without_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=[4, 5])
    assert load(folder).eos_token_ids == {4, 5}


def test_missing_folder(tmp_path: Path) -> None:
    text = refusal(tmp_path / "nothing", ExitCode.MODEL_NOT_FOUND)
    assert "does not exist" in text


def test_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, ExitCode.MODEL_NOT_FOUND)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    assert "fetch the model again" in refusal(folder, ExitCode.MODEL_CORRUPT)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "quokka"}, "'quokka' is unknown to transformers"),
        ({"model_type": None}, "unknown to transformers"),
        ({"model_type": "quokka", "auto_map": {"AutoConfig": "x.Y"}}, "--trust-remote-code"),
        ({"model_type": "t5"}, "'t5' has neither a causal language model nor an encoder"),
        (
            {"architectures": ["LlamaForQuestionAnswering"]},
            "is neither a causal language model",
        ),
        ({"quantization_config": {"quant_method": "exl2"}}, "quantized (EXL2): its codes lie"),
        ({"quantization_config": {"quant_method": "eetq"}}, "quantized (EETQ): its codes lie"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized (HQQ): its codes need"),
        ({"quantization_config": {"quant_method": "quokka"}}, "(quokka): this method is not known"),
        ({"quantization_config": {"bits": 4}}, "quantized (an unnamed method)"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            "(GPTQ): its codes have 3 bits; 2, 4, 8 are read; serve the model that it was made from",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
            "the order of marlin",
        ),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "the order of gemv"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "(AWQ): its codes have 8"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}},
            "(ModelOpt): its algorithm is W4A8_AWQ",
        ),
        (
            {
                "compression_config": {
                    "quant_method": "compressed-tensors",
                    "format": "marlin-24",
                }
            },
            "(compressed-tensors): its format is marlin-24",
        ),
        ({"quantization": {"bits": 3, "group_size": 64}}, "(MLX): its codes have 3 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "quantized (HQQ)"),
        ({"hidden_size": "wide"}, "transformers cannot read its config.json"),
    ],
)
def test_unsupported_configs(folder: Path, values: dict[str, Any], text: str) -> None:
    edit_json(folder / "config.json", **values)
    assert text in refusal(folder, ExitCode.MODEL_UNSUPPORTED)


@pytest.mark.parametrize(
    ("name", "method"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")]
)
def test_a_quantized_checkpoint_that_a_file_beside_it_tells_of(
    folder: Path, name: str, method: str
) -> None:
    (folder / name).write_text('{"bits": 3}')
    assert f"quantized ({method})" in refusal(folder, ExitCode.MODEL_UNSUPPORTED)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_codes_that_nothing_tells_of_are_never_taken_for_weights(
    folder: Path, dtype: torch.dtype
) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = refusal(folder, ExitCode.MODEL_UNSUPPORTED)
    assert f"{name} is stored as" in text
    assert "quantized" in text


def test_architecture_without_the_attention_interface(tmp_path: Path) -> None:
    text = refusal(make_tiny_model("bloom", tmp_path / "bloom"), ExitCode.MODEL_UNSUPPORTED)
    assert "does not use transformers' attention interface" in text


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = refusal(folder, ExitCode.MODEL_UNSUPPORTED)
    assert "pickled" in text
    assert "pytorch_model.bin" in text


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder, ExitCode.MODEL_NOT_FOUND)


@pytest.mark.parametrize("keep", [0, 5, 2000, -100])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or cut short" in refusal(folder, ExitCode.MODEL_CORRUPT)


def test_index_that_names_a_missing_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert "lacks model-00002-of-00002.safetensors" in refusal(folder, ExitCode.MODEL_CORRUPT)


def test_index_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is not a safetensors index" in refusal(folder, ExitCode.MODEL_CORRUPT)


def test_missing_tensor_is_not_filled_at_random(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder, ExitCode.MODEL_CORRUPT)


def test_tensor_of_another_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path, metadata={"format": "pt"})
    assert "another shape: model.norm.weight" in refusal(folder, ExitCode.MODEL_CORRUPT)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    load(path)


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    assert "choose a smaller model" in refusal(folder, ExitCode.OUT_OF_MEMORY)


def test_unknown_dtype(folder: Path) -> None:
    assert "choose auto, float32" in refusal(folder, ExitCode.USAGE, dtype="float8")


def test_bfloat16_on_a_cpu_when_asked_for(folder: Path) -> None:
    assert load(folder, dtype="bfloat16").dtype is torch.bfloat16


def test_bfloat16_on_a_cpu_is_how_weights_are_stored(folder: Path) -> None:
    if load_quantized()[0] is None:
        pytest.skip(str(load_quantized()[1]))
    narrow = load(folder, dtype="bfloat16", linear_backend="auto")
    assert (narrow.dtype, narrow.linear_backend) == (torch.float32, "bfloat16")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    stored = narrow._model.get_submodule(name).weight
    assert torch.equal(stored, weights[f"{name}.weight"].bfloat16().float())
    assert narrow.weight_bytes < load(folder, linear_backend="panel").weight_bytes


def test_unknown_attention_backend(folder: Path) -> None:
    text = refusal(folder, ExitCode.BACKEND_UNAVAILABLE, attention_backend="magic")
    assert "'magic'" in text
