"""A model with an adapter in its weights, as a folder: what several ranks read their parts of.

One process that has the whole model merges while it loads (``merged``). Ranks have parts of
matrices only, and PEFT merges whole ones; so it is done once, before they start.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from lorax_shard.prepare.files import Progress, ProgressEvent, disk_errors, publish_folder

logger = logging.getLogger(__name__)

# Part of the folder's name; another way to merge is another folder.
_MERGER_VERSION = 1


def merged_folder(
    model_dir: Path,
    adapter_dir: Path,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    cache_dir: Path,
    progress: Progress,
) -> Path:
    """Return the folder of the merged model, made at most once for a model, adapter and dtype.

    ``dtype`` and ``device`` are the shards', so that it is merged in what they compute in.
    StartupError says why it cannot be merged.
    """
    stats = [(path.name, path.stat()) for path in sorted(model_dir.iterdir()) if path.is_file()]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    identity = [str(model_dir), files, adapter_dir.name, dtype, device, _MERGER_VERSION]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache_dir / "merged" / f"{model_dir.name[:60]}-{key}"

    def build(target: Path) -> None:
        progress(ProgressEvent("merge the adapter", 0, 1, "model"))
        _merge(model_dir, adapter_dir, target, dtype, device, trust_remote_code)
        progress(ProgressEvent("merge the adapter", 1, 1, "model"))

    def on_wait() -> None:
        logger.info("another process merges %s; waiting for it", adapter_dir.name)

    facts = {"model": str(model_dir), "adapter": adapter_dir.name, "dtype": dtype}
    with disk_errors(cache_dir):
        return publish_folder(folder, build, facts, on_wait)


def _merge(
    model_dir: Path, adapter_dir: Path, target: Path, dtype: str, device: str, trust: bool
) -> None:
    import torch

    from lorax_shard.model.loader import read_config, resolve_dtype
    from lorax_shard.model.merged import merge_adapter
    from lorax_shard.model.read_weights import load_weights

    config = read_config(model_dir, trust_remote_code=trust)
    torch_dtype = resolve_dtype(dtype, config, torch.device(device))
    model = load_weights(model_dir, config, torch_dtype, torch.device("cpu"), trust)
    merge_adapter(model, adapter_dir)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        # The adapter changed one of the two; a reader must not tie them again.
        for each in (model.config, model.config.get_text_config()):
            each.tie_word_embeddings = False
    model.save_pretrained(target)
