"""The playground in a browser: Playwright and axe beside a server, neither a part of this project.

Chromium is the system's (``apt-get install chromium``, or ``CHROMIUM=/path``), else Playwright's own. With
``LOOK_PICTURES=docs/pictures`` the pictures of docs/playground.md are made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.acceptance.clients.runs import releases_of
from tests.acceptance.environments import environment
from tests.acceptance.harness import Result
from tests.helpers.server import Server

ROOT = Path(__file__).parents[3]
CACHE = Path(os.environ.get("LORAX_CACHE", "~/.cache/lorax-py")).expanduser() / "acceptance"
AXE = "axe-core@4"
SERVER = (
    "--device", "cpu", "--adapter-source", "local", "--adapter-local-root",
    str(ROOT / "examples/adapters"), "--num-blocks", "800", "--playground",
)  # fmt: skip
ADMIN_KEY = "sk-of-the-operator"
TENANT_KEYS = {"ant": "sk-of-tenant-ant", "bee": "sk-of-tenant-bee"}
BOUND_S = 1500.0


def point_playground() -> Result:
    """Click through the page, without keys and with them."""
    with environment("playwright", "pillow") as programs, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chromium, axe = chromium_of(programs), axe_script()
        setting = {"chromium": chromium, "axe": str(axe), "pictures": str(pictures_of(folder))}
        releases = releases_of(programs, ("playwright", "pillow"))
        with Server(*SERVER) as server:
            first = run_scenes(programs, "open_scenes", {**setting, "url": server.url})
        keys = {"admin_key": ADMIN_KEY, "tenant_keys": TENANT_KEYS}
        # A name that is an id, too.
        named = ("--lora-modules", "sentiment=local:sentiment", "--http-workers", "2")
        with Server(*SERVER, *key_options(folder), *named) as server:
            second = run_scenes(programs, "keyed_scenes", {**setting, **keys, "url": server.url})
    ok = bool(first and second)
    return Result(ok, f"{len(first)} checks without keys, {len(second)} with; {releases}")


def key_options(folder: Path) -> Sequence[str]:
    """Write the file of tenants, and return the options that name it and the admin's key."""
    path = folder / "keys.json"
    tenants = {name: {"keys": [key]} for name, key in TENANT_KEYS.items()}
    path.write_text(json.dumps({"tenants": tenants}))
    return "--api-keys-file", str(path), "--admin-api-key", ADMIN_KEY


def pictures_of(folder: Path) -> Path:
    """Return where pictures go: where they are wanted, else to where they are forgotten."""
    wanted = os.environ.get("LOOK_PICTURES")
    found = ROOT / wanted if wanted else folder / "pictures"
    found.mkdir(parents=True, exist_ok=True)
    return found


def run_scenes(programs: Path, module: str, setting: dict[str, object]) -> list[str]:
    """Run scenes in the browser's environment; return what was checked, nothing if one failed."""
    run = subprocess.run(
        [str(programs / "python"), "-m", f"tests.acceptance.look.{module}"],
        input=json.dumps(setting), cwd=ROOT, text=True, capture_output=True, check=False,
        timeout=BOUND_S,
    )  # fmt: skip
    if run.returncode:
        print(run.stdout[-6000:], run.stderr[-4000:], flush=True)
        return []
    checked = [line for line in run.stdout.splitlines() if line.startswith("ok: ")]
    print("\n".join(f"    {line}" for line in checked), flush=True)
    return checked


def chromium_of(programs: Path) -> str:
    """Return the browser's program; the system's, else Playwright's, which is fetched then."""
    named = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if named is None:
        subprocess.run([str(programs / "playwright"), "install", "chromium"], check=True)
    return named or ""


def axe_script() -> Path:
    """Return the accessibility checker's script, fetched by npm once; it is never committed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    script = CACHE / f"{AXE}.min.js"
    if not script.exists():
        with tempfile.TemporaryDirectory() as name:
            command = ["npm", "pack", "--silent", AXE]
            subprocess.run(command, cwd=name, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(name).glob("*.tgz")
            with tarfile.open(archive) as packed:
                content = packed.extractfile("package/axe.min.js")
                assert content is not None
                script.write_bytes(content.read())
    return script
