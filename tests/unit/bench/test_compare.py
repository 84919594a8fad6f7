"""Comparisons: systems in turns, each round on ids of its own, ratios of rounds side by side."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorax_bench.cli import main
from lorax_bench.compare import ComparisonPlan, compare, turns
from lorax_bench.peers.environments import Environments, PeerMissing
from lorax_bench.peers.kinds import OURS, PEERS, Answer, PeerKind, Setting, vllm_command
from lorax_bench.peers.worker_peer import PeerFailed
from lorax_bench.records import Record
from lorax_bench.requests import Workload

SMALL = "mixed,requests=4,prompt=4-8,output=2-6"
CONFIG = {
    "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
}  # fmt: skip


@dataclass
class Bench:
    """Fakes of all systems; each has a speed, and notes when it was asked for what."""

    speeds: dict[str, float] = field(default_factory=dict)
    short: str = ""
    at_once: str = ""
    seen: list[tuple[str, Workload]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, PeerKind]:
        return {
            name: replace(kind, start=self._start(name), environment=None)
            for name, kind in PEERS.items()
        }

    def _start(self, name: str) -> object:
        @contextlib.contextmanager
        def start(setting: Setting) -> Iterator[Answer]:
            self.events.append(f"start {name} with {len(setting.adapters)}")
            yield lambda workload: self._answer(name, workload)
            self.events.append(f"end {name}")

        return start

    def _answer(self, name: str, workload: Workload) -> list[Record]:
        self.seen.append((name, workload))
        step = 1 / self.speeds.get(name, 1.0)
        whole = 0 if name == self.at_once else 1
        # Each run of a system takes a tenth longer than its last.
        step *= 1 + 0.1 * sum(other == name for other, _ in self.seen)
        return [
            Record(
                request=number, adapter=each.adapter, sent_s=0.0,
                token_times_s=[
                    step * (place * whole + 1) for place in range(each.max_tokens - (name == self.short))
                ],
            )
            for number, each in enumerate(workload.requests)
        ]  # fmt: skip


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def plan(**values: object) -> ComparisonPlan:
    return ComparisonPlan(**{"workloads": (SMALL,), **values})  # type: ignore[arg-type]


def test_systems_take_turns_and_each_begins_in_its_turn(model_dir: Path) -> None:
    bench = Bench()
    compare(
        plan(peers=("vllm", "openvino"), rounds=3), model_dir,
        environments=Environments(model_dir), kinds=bench.kinds(),
    )  # fmt: skip
    names = [name for name, _ in bench.seen]
    assert names == [
        "ours", "vllm", "openvino",  # warm
        "ours", "vllm", "openvino",
        "vllm", "openvino", "ours",
        "openvino", "ours", "vllm",
    ]  # fmt: skip
    assert turns(["a"], 5) == ["a"]


def test_all_get_the_same_requests_and_each_round_has_ids_of_its_own(model_dir: Path) -> None:
    bench = Bench()
    compare(
        plan(peers=("vllm",), rounds=2), model_dir,
        environments=Environments(model_dir), kinds=bench.kinds(),
    )  # fmt: skip
    ids = {
        name: [
            tuple(each.prompt_ids for each in load.requests)
            for other, load in bench.seen
            if other == name
        ]
        for name in (OURS, "vllm")
    }
    assert ids[OURS] == ids["vllm"]
    assert len(set(ids[OURS])) == 3
    sizes = {
        tuple((len(each.prompt_ids), each.max_tokens) for each in load.requests)
        for _, load in bench.seen
    }
    assert len(sizes) == 1


def test_ratios_are_of_rounds_side_by_side_without_the_warm_up(model_dir: Path) -> None:
    bench = Bench({OURS: 6.0, "vllm": 2.0})
    (found,) = compare(
        plan(peers=("vllm",), rounds=3), model_dir,
        environments=Environments(model_dir), kinds=bench.kinds(),
    )  # fmt: skip
    assert len(found.values(OURS)) == 3
    assert found.ratio("vllm").of_rounds == pytest.approx([3.0, 3.0, 3.0])
    assert found.ratio("vllm", "ttft_p50_s").of_medians == pytest.approx(1 / 3)
    named = {each.name: each.value for each in found.named_ratios()}
    assert named[f"{SMALL}, base: tokens/s, ours / vllm"] == pytest.approx(3.0)


def test_what_a_peer_has_none_of_has_no_ratio(model_dir: Path) -> None:
    """A static batch gives all tokens at once: there is no time between them."""
    bench = Bench(at_once="static")
    (found,) = compare(
        plan(peers=("static",)), model_dir,
        environments=Environments(model_dir), kinds=bench.kinds(),
    )  # fmt: skip
    words = [each.name.partition(": ")[2] for each in found.named_ratios()]
    assert words == ["tokens/s, ours / static", "first token p50, ours / static"]


def test_who_cannot_serve_adapters_has_no_turn_with_them(model_dir: Path) -> None:
    bench = Bench()
    base, with_two = compare(
        plan(peers=("openvino", "static", "vllm", "peft"), adapters=(0, 2), rounds=2), model_dir,
        environments=Environments(model_dir), kinds=bench.kinds(),
    )  # fmt: skip
    assert base.peers == ["openvino", "static", "vllm"]
    assert with_two.peers == ["vllm", "peft"]
    starts = [event for event in bench.events if event.startswith("start")]
    assert "start vllm with 0" in starts
    assert "start peft with 2" in starts
    # Those of the first group have ended before the second's start: each has the memory alone.
    assert bench.events.index("end vllm") < bench.events.index("start vllm with 2")


def test_who_takes_minutes_has_one_turn_with_adapters_and_a_short_warm_up(
    model_dir: Path,
) -> None:
    bench = Bench({OURS: 4.0})
    (found,) = compare(
        plan(peers=("peft",), adapters=(2,), rounds=3), model_dir,
        environments=Environments(model_dir), kinds=bench.kinds(),
    )  # fmt: skip
    assert len(found.values("peft")) == 1
    assert len(found.values(OURS)) == 3
    assert len(found.ratio("peft").of_rounds) == 1
    warm = next(load for name, load in bench.seen if name == "peft")
    assert max(each.max_tokens for each in warm.requests) <= 4
    assert {each.adapter for each in warm.requests} == {0, 1}


def test_a_missing_token_ends_the_comparison(model_dir: Path) -> None:
    bench = Bench(short="vllm")
    with pytest.raises(PeerFailed, match="vllm did not answer"):
        compare(
            plan(peers=("vllm",)), model_dir,
            environments=Environments(model_dir), kinds=bench.kinds(),
        )  # fmt: skip


def test_a_missing_environment_is_told_before_anything_starts(model_dir: Path) -> None:
    bench = Bench()
    kinds = bench.kinds()
    kinds["vllm"] = replace(kinds["vllm"], environment="vllm")
    with pytest.raises(PeerMissing, match=r"vllm is not installed .* `make bench-peers`"):
        compare(
            plan(peers=("openvino", "vllm")), model_dir,
            environments=Environments(model_dir / "none"), kinds=kinds,
        )  # fmt: skip
    assert bench.events == []


def test_a_load_over_time_is_for_servers_alone(model_dir: Path) -> None:
    bench = Bench()
    environments = Environments(model_dir)
    load = plan(workloads=("chat",), peers=("static",))
    with pytest.raises(ValueError, match="sends its requests over time"):
        compare(load, model_dir, environments=environments, kinds=bench.kinds())
    assert bench.events == []
    served = plan(workloads=("chat",), peers=("vllm",), rounds=1)
    compare(served, model_dir, environments=environments, kinds=bench.kinds())


def test_an_unknown_peer_is_told() -> None:
    with pytest.raises(ValueError, match="there is no peer 'tgi'"):
        plan(peers=("tgi",))


def test_the_command_refuses_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAX_BENCH_PEERS", str(tmp_path))
    monkeypatch.setattr("lorax_bench.serve.prepare_model", lambda options: ("m", tmp_path))
    done = CliRunner().invoke(main, ["compare", "--peers", "vllm", "--workload", SMALL])
    assert done.exit_code == 1
    assert "Run `make bench-peers`" in done.output
    done = CliRunner().invoke(main, ["compare", "--peers", "tgi"])
    assert "there is no peer 'tgi'" in done.output


def test_vllm_serves_adapters_under_the_names_of_their_folders(tmp_path: Path) -> None:
    base = Setting(model_dir=tmp_path, max_requests=32)
    command = vllm_command(Path("python"), 1234, base)
    assert "--no-enable-prefix-caching" in command
    assert "--enable-lora" not in command
    both = replace(base, adapters=[tmp_path / "adapter-0", tmp_path / "adapter-1"])
    command = vllm_command(Path("python"), 1234, both)
    assert command[command.index("--max-loras") + 1] == "2"
    assert command[-2:] == [f"adapter-{n}={tmp_path}/adapter-{n}" for n in (0, 1)]
