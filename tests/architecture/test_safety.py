"""What could run the code of strangers is not in the source: pickle, evaluation, shells, models' code."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from tests.architecture.test_source import name_of, source_files

from lorax_contract.config import RouterConfig, ShardConfig
from lorax_launcher.options import LauncherOptions

# Reading what they wrote runs whatever is written there.
_MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml",
    "multiprocessing", "torch.multiprocessing",
}  # fmt: skip
_CALLS = {
    "eval", "exec", "torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load",
    "os.system", "os.popen", "asyncio.create_subprocess_shell", "subprocess.getoutput",
}  # fmt: skip
# torch.distributed's calls that exchange objects exchange pickles.
_OBJECTS = re.compile(r"\b(\w+_object|\w+_object_list)$")
# Rooms that handle what comes with adapters and requests.
_FOREIGN = ("router/", "shard/lorax_shard/fetching", "shard/lorax_shard/store",
            "shard/lorax_shard/peft", "shard/lorax_shard/adapters", "shard/lorax_shard/lora",
            "shard/lorax_shard/constraints")  # fmt: skip


def dangers(source: str) -> list[str]:
    """Return what of a source could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name in _MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in _MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in _CALLS or (_OBJECTS.search(called) and "distributed" in called):
                found.append(called)
            found += [
                f"{called}({each.arg})"
                for each in node.keywords
                if each.arg in ("shell", "allow_pickle", "weights_only")
                or (each.arg == "trust_remote_code" and ast.unparse(each.value) == "True")
            ]
    return found


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import " + "pickle", "from marshal import loads", "torch.load(path)", "eval(text)",
        "np.load(path)", "numpy.load(path, allow_pickle=False)", "os.system(text)",
        "subprocess.run(text, shell=True)", "distributed.broadcast_object_list(each)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)", "import multiprocessing",
    ],
)  # fmt: skip
def test_what_could_is_noticed(source: str) -> None:
    assert dangers(source)


def test_what_is_safe_is_not_taken_for_it() -> None:
    source = "json.loads(text); model.eval(); subprocess.run(words); prepare(trust_remote_code=x)"
    assert dangers(source) == []


def test_a_models_code_runs_only_where_the_launch_asks_for_it() -> None:
    assert not LauncherOptions().trust_remote_code
    fields = {field.name: field.default for field in dataclasses.fields(ShardConfig)}
    assert fields["trust_remote_code"] is False
    assert "trust_remote_code" not in {field.name for field in dataclasses.fields(RouterConfig)}


@pytest.mark.parametrize(
    "path", [each for each in source_files() if name_of(each).startswith(_FOREIGN)], ids=name_of
)
def test_what_comes_with_adapters_is_never_trusted(path: Path) -> None:
    text = path.read_text()
    assert "trust_remote_code" not in text
    assert "AutoTokenizer" not in text
    assert "AutoModel" not in text
