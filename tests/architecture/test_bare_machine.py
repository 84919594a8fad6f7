"""What `make gpu-check` needs imports without the packages that only front ends need."""

from __future__ import annotations

import subprocess
import sys

# Not on a bare GPU machine.
MISSING = (
    "boto3", "fastapi", "gguf", "grpc_health", "grpc_reflection", "httptools", "llguidance",
    "msgspec", "orjson", "pydantic", "starlette", "uvicorn",
)  # fmt: skip
CODE = """
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
for module in {modules!r}:
    importlib.import_module(module)
"""


def test_it_imports_without_the_packages_of_front_ends() -> None:
    modules = (
        "lorax_shard.app",
        "lorax_shard.rpc.server",
        "lorax_shard.engine.engine",
        "lorax_shard.adapters.setup",
        "lorax_router.startup",
        "lorax_router.service.inference",
        "lorax_router.shards.group",
    )
    done = import_without(MISSING, modules)
    assert done.returncode == 0, done.stderr


def test_the_packages_count_as_missing() -> None:
    done = import_without(MISSING, ("lorax_router.http_api.app",))
    assert "ModuleNotFoundError: fastapi" in done.stderr


def import_without(
    missing: tuple[str, ...], modules: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    code = CODE.format(missing=set(missing), modules=modules)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
