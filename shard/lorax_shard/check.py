"""``lorax-shard check``: says whether an adapter's folder would be served with a model, without one.

The model is built on the meta device from its config alone: nothing is read but what describes it, and
of the adapter what a server reads. What is wrong is said in a server's words.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from lorax_contract import logs
from lorax_contract.cache import default_cache_dir
from lorax_contract.errors import LoraxError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.peft.errors import AdapterRefusedError

CONFIG_FILE = "adapter_config.json"
# All that describes a model on the hub.
_DESCRIBED_BY = ("config.json", "tokenizer.json")


@dataclass(slots=True)
class CheckReport:
    """What was found out about a folder."""

    folder: str
    model: str
    # Why the adapter would not be served; None: it would.
    refusal: str | None = None
    # What it is, as the server knows it.
    facts: dict[str, Any] = field(default_factory=dict)
    # Options of its configuration that are not PEFT's own: name, value, treatment, note.
    options: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(folder: Path, model_id: str | None, model_dir: Path, max_rank: int) -> CheckReport:
    """Return the report on an adapter's folder beside a model's.

    Raises StartupError when the model is none that is served.
    """
    from lorax_shard.peft.context import make_context
    from lorax_shard.peft.files import AdapterLimits
    from lorax_shard.peft.verify import verify

    report = CheckReport(str(folder), model_id or model_dir.name)
    tokenizer = model_dir / "tokenizer.json"
    context = make_context(
        _described(model_dir), AdapterLimits(max_rank=max_rank), model_id or "",
        tokenizer if tokenizer.is_file() else None,
    )  # fmt: skip
    report.options = _options_of(folder)
    try:
        if not folder.is_dir():
            raise AdapterRefusedError(f"there is no folder {folder}")
        with tempfile.TemporaryDirectory() as target:
            report.facts = verify(folder, Path(target), context)
        report.warnings = report.facts.pop("warnings")
    except (LoraxError, ValueError) as error:
        report.refusal = error.public if isinstance(error, LoraxError) else str(error)
    return report


def _described(model_dir: Path) -> Any:
    """Describe the model as transformers builds it, without its weights."""
    from lorax_shard.model.loader import read_config
    from lorax_shard.model.outline import outline

    return outline(read_config(model_dir, trust_remote_code=False))


def _options_of(folder: Path) -> list[dict[str, Any]]:
    """Return the options that say something: those whose value is not what PEFT has without them."""
    from peft import LoraConfig

    from lorax_shard.peft.fields import OPTIONS

    try:
        document = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return []  # the refusal says what is wrong with it
    if not isinstance(document, Mapping):
        return []
    # As PEFT saves them: sets are lists there.
    plain = json.loads(json.dumps(dataclasses.asdict(LoraConfig()), default=list))
    known = {option.name: option for option in OPTIONS}
    return [
        {
            "name": name,
            "value": value,
            "treatment": known[name].treatment.value if name in known else "unknown",
            "note": known[name].note if name in known else "not an option that this server knows",
        }
        for name, value in document.items()
        if name not in plain or plain[name] != value
    ]


def find_model(model_id: str | None, cache_dir: Path) -> Path:
    """Return a folder that describes the model: a local one, the default, or the hub's small files."""
    from lorax_shard.prepare.prepare import is_path, prepare

    if model_id is None or is_path(model_id):
        prepared = prepare(
            model_id, revision=None, source="hub", cache_dir=cache_dir, trust_remote_code=False,
            progress=lambda _event: None,
        )  # fmt: skip
        return prepared.model_dir
    from huggingface_hub import snapshot_download

    name, _, revision = model_id.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=_DESCRIBED_BY)
        )
    except Exception as error:
        raise StartupError(
            f"the hub does not give the config of {model_id}: {error}. Name a folder with "
            "--model-id to check without it.",
            ExitCode.MODEL_NOT_FOUND,
        ) from error


@click.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model-id", help="Folder, .gguf file or hub id; without it the embedded default.")
@click.option("--max-adapter-rank", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where converted models are kept; default $LORAX_CACHE or ~/.cache/lorax-py.",
)
def check_command(
    folder: Path, model_id: str | None, max_adapter_rank: int, cache_dir: Path | None
) -> None:
    """Say in one JSON object what a server would make of an adapter's FOLDER.

    The exit code is 0 for an adapter that would be served, 1 for one that is refused; others mean that
    the model cannot be described.
    """
    logs.configure("warning")
    try:
        model_dir = find_model(model_id, cache_dir or default_cache_dir())
        report = check(folder, model_id, model_dir, max_adapter_rank)
    except StartupError as error:
        click.echo(str(error), err=True)
        sys.exit(int(error.exit_code))
    click.echo(json.dumps(dataclasses.asdict(report)))
    sys.exit(int(report.refusal is not None))
