"""What the launcher finds out about the machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from lorax_launcher.facts import (
    GpuFacts,
    count_cores,
    cpu_quota,
    gather_facts,
    parse_gpus,
    select_visible,
    total_memory,
)

TWO = (GpuFacts("A", 2**30, "0"), GpuFacts("B", 2**31, "1"))


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("200000 100000", 2), ("50000 100000", 1), ("", None), ("x y", None)],
)
def test_cpu_quota(tmp_path: Path, text: str, quota: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_a_machine_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "absent") is None


def test_a_quota_limits_the_cores(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert count_cores(tmp_path) == 1


def test_a_limit_lowers_the_memory(tmp_path: Path) -> None:
    whole = total_memory(tmp_path)
    (tmp_path / "memory.max").write_text("1048576")
    assert total_memory(tmp_path) == 2**20 < whole
    (tmp_path / "memory.max").write_text("max")
    assert total_memory(tmp_path) == whole


def test_lines_of_nvidia_smi() -> None:
    listing = "NVIDIA H200, 143771\nodd line\nTesla, T4, 15360\n"
    assert parse_gpus(listing) == (
        GpuFacts("NVIDIA H200", 143771 * 2**20, "0"),
        GpuFacts("Tesla, T4", 15360 * 2**20, "1"),
    )


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, TWO),
        ("", ()),
        ("1", (TWO[1],)),
        ("1,0", (TWO[1], TWO[0])),
        ("0,-1,1", (TWO[0],)),
        ("7", ()),
        ("GPU-abc", (dataclasses.replace(TWO[0], handle="GPU-abc"),)),
        ("none", ()),
    ],
)
def test_cuda_visible_devices(visible: str | None, expected: tuple[GpuFacts, ...]) -> None:
    assert select_visible(TWO, visible) == expected


def test_a_named_gpu_where_none_is() -> None:
    assert select_visible((), "GPU-abc") == ()


def test_facts_of_this_machine() -> None:
    facts = gather_facts()
    assert 1 <= facts.num_cores <= len(os.sched_getaffinity(0))
    assert facts.memory_bytes > 2**28
