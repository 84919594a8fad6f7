"""Code that comes with a model is run where the launch asks for it, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from lorax_contract.errors import StartupError
from lorax_shard.model.loader import read_config

_CODE = """
from pathlib import Path
from transformers import LlamaConfig

Path({mark!r}).touch()

class MysteryConfig(LlamaConfig):
    model_type = "mystery"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = tmp_path / "model"
    made.mkdir()
    config = {
        "model_type": "mystery", "architectures": ["MysteryForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_mystery.MysteryConfig"},
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config))
    (made / "configuration_mystery.py").write_text(_CODE.format(mark=str(tmp_path / "ran")))
    return made


def test_without_being_asked_for_it_is_not_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="trust-remote-code"):
        read_config(folder, trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


def test_where_it_is_asked_for_it_is_run(folder: Path, tmp_path: Path) -> None:
    assert read_config(folder, trust_remote_code=True).model_type == "mystery"
    assert (tmp_path / "ran").exists()
