"""Writes a model as OpenVINO reads it, its weights in float32: ``openvino_model.py MODEL FOLDER``."""

from __future__ import annotations

import sys


def main() -> None:
    """Export with the tool that OpenVINO's own notes name."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        sys.argv[1], sys.argv[2], task="text-generation-with-past",
        ov_config=OVConfig(dtype="fp32"), convert_tokenizer=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
