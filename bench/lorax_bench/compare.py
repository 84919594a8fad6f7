"""Systems beside each other, in turns: each round runs each of them once, on prompts of its own.

All systems of a comparison are started first and stay in memory; but for this server, which waits
without work, each is stopped by a signal while it has no turn. So a round's runs lie seconds apart
and see the same machine, which starting anew in between (a minute for some) would not give; and
their memory, about 12 GiB for all of them with the default model, is there on the machines that
this is meant for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_bench.adapters import write_adapters
from lorax_bench.document import MeasuredRun, NamedRatio, Results, brief, measured, results
from lorax_bench.measures import Ratio, ratio
from lorax_bench.peers.environments import Environments, versions
from lorax_bench.peers.kinds import OURS, PEERS, Answer, PeerKind, Setting
from lorax_bench.peers.worker_peer import PeerFailed, check_at_once
from lorax_bench.requests import Workload
from lorax_bench.workloads import LoadOptions, build

# Ids of no measured round.
_WARM_ROUND = 1_000_003
_WARM_TOKENS, _WARM_REQUESTS = 4, 4
MEASURES = ("output_tokens_per_s", "ttft_p50_s", "inter_token_p50_s")
"""What systems are compared by."""
_WORDS = ("tokens/s", "first token p50", "between tokens p50")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPlan:
    """What is to be compared."""

    workloads: tuple[str, ...] = ("w1",)
    adapters: tuple[int, ...] = (0,)
    peers: tuple[str, ...] = ("vllm",)
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if unknown := [name for name in self.peers if name not in PEERS]:
            raise ValueError(f"there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}")

    def workload(self, spec: str, num_adapters: int, number: int) -> Workload:
        """Return a workload's requests of one round."""
        options = LoadOptions(adapters=num_adapters)
        return build(spec, options=options, seed=self.seed, number=number)

    def names(self, num_adapters: int) -> tuple[str, ...]:
        """The systems that can serve so many adapters, this server first."""
        chosen = dict.fromkeys((OURS, *self.peers))
        return tuple(name for name in chosen if PEERS[name].can_serve(num_adapters))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A workload with some adapters: each system's runs, one of each round that it ran in."""

    workload: str
    num_adapters: int
    runs: dict[str, list[MeasuredRun]]
    """Of each system, by name."""

    def values(self, name: str, measure: str = MEASURES[0]) -> list[float]:
        """Return one of MEASURES of each round of a system."""
        return [brief(run.figures)[measure] or 0.0 for run in self.runs[name]]

    def ratio(self, name: str, measure: str = MEASURES[0]) -> Ratio:
        """Return how many times as much this server has as a peer, over the rounds of both."""
        theirs = {run.round: run for run in self.runs[name]}
        ours = [run for run in self.runs[OURS] if run.round in theirs]
        shared = Comparison(
            workload=self.workload, num_adapters=self.num_adapters,
            runs={OURS: ours, name: [theirs[run.round] for run in ours]},
        )  # fmt: skip
        return ratio(shared.values(OURS, measure), shared.values(name, measure))

    @property
    def peers(self) -> list[str]:
        """All systems but this server."""
        return [name for name in self.runs if name != OURS]

    def named_ratios(self) -> list[NamedRatio]:
        """Return all ratios with the words that they are shown by."""
        found = []
        for name in self.peers:
            for measure, words in zip(MEASURES, _WORDS):
                # A batch that answers at its end has no time between tokens.
                if not min(self.values(name, measure)):
                    continue
                each = self.ratio(name, measure)
                low, high = each.bounds
                title = f"{self.workload}, {variant(self.num_adapters)}: {words}, {OURS} / {name}"
                found.append(NamedRatio(name=title, value=each.of_medians, low=low, high=high))
        return found


def variant(num_adapters: int) -> str:
    """Return what the runs with so many adapters are called."""
    return f"{num_adapters} adapters" if num_adapters else "base"


def check_environments(
    plan: ComparisonPlan,
    environments: Environments,
    model_dir: Path,
    kinds: Mapping[str, PeerKind] = PEERS,
) -> None:
    """Refuse at once, not after minutes, where a peer's environment is not there."""
    for name in plan.peers:
        if environment := kinds[name].environment:
            environments.python(environment)
            if environments.needs_model(environment):
                environments.model(environment, model_dir)


def check_workloads(plan: ComparisonPlan) -> None:
    """Refuse workloads that a chosen peer cannot be given."""
    for spec in plan.workloads:
        workload = plan.workload(spec, 0, 0)
        if not all(PEERS[name].is_server for name in plan.peers):
            check_at_once(workload)


def compare(
    plan: ComparisonPlan,
    model_dir: Path,
    *,
    environments: Environments,
    options: Sequence[str] = (),
    kinds: Mapping[str, PeerKind] = PEERS,
    told: Callable[[str], None] = lambda line: None,
) -> list[Comparison]:
    """Run the plan; ``told`` hears of each run as it ends."""
    check_environments(plan, environments, model_dir, kinds)
    check_workloads(plan)
    found = []
    for num_adapters in plan.adapters:
        with tempfile.TemporaryDirectory(prefix="lorax-bench-") as folder:
            adapters = write_adapters(model_dir, Path(folder), num_adapters)
            sizes = [len(plan.workload(spec, 0, 0).requests) for spec in plan.workloads]
            setting = Setting(
                model_dir=model_dir, adapters=adapters, max_requests=max(sizes),
                options=options, environments=environments,
            )  # fmt: skip
            found += _compare_group(plan, num_adapters, setting, kinds, told)
    return found


def _compare_group(
    plan: ComparisonPlan,
    num_adapters: int,
    setting: Setting,
    kinds: Mapping[str, PeerKind],
    told: Callable[[str], None],
) -> list[Comparison]:
    """Compare all workloads with one number of adapters: systems are started once."""
    names = plan.names(num_adapters)
    comparisons = {
        spec: Comparison(
            workload=spec, num_adapters=num_adapters, runs={name: [] for name in names}
        )
        for spec in plan.workloads
    }
    with contextlib.ExitStack() as stack:
        answers = {}
        for name in names:
            told(f"{variant(num_adapters)}: starting {name}")
            answers[name] = stack.enter_context(kinds[name].start(setting))
        for spec in plan.workloads:
            for name in names:
                told(f"{spec}, {variant(num_adapters)}: warming {name} up")
                _warm(answers[name], kinds[name], plan.workload(spec, num_adapters, _WARM_ROUND))
        for number in range(plan.rounds):
            # Nobody is always the first after the pause.
            for name in turns(names, number):
                if number and num_adapters and not kinds[name].is_fast:
                    continue
                for spec in plan.workloads:
                    workload = plan.workload(spec, num_adapters, number)
                    found = run_once(name, answers[name], workload, number)
                    comparisons[spec].runs[name].append(found)
                    told(_line(found))
    return list(comparisons.values())


def turns(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: each begins in its turn."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _warm(answer: Answer, kind: PeerKind, workload: Workload) -> None:
    """Let a system do what it does but once: a whole round, or a few tokens of each adapter."""
    if kind.is_fast:
        answer(workload)
        return
    num = max(workload.num_adapters, _WARM_REQUESTS)
    few = tuple(
        dataclasses.replace(each, max_tokens=min(each.max_tokens, _WARM_TOKENS))
        for each in workload.requests[:num]
    )
    answer(dataclasses.replace(workload, requests=few))


def run_once(name: str, answer: Answer, workload: Workload, number: int) -> MeasuredRun:
    """Run a workload and measure it; raises PeerFailed where a token is missing."""
    named = variant(workload.num_adapters)
    found = measured(name, workload, answer(workload), variant=named, round=number)
    figures = found.figures
    if figures.num_failed or figures.num_output_tokens != workload.num_output_tokens:
        raise PeerFailed(
            f"{name} did not answer {figures.num_failed} of {figures.num_requests} requests as "
            f"asked, with {figures.num_output_tokens} of {workload.num_output_tokens} tokens: "
            f"{figures.errors}"
        )
    return found


def _line(run: MeasuredRun) -> str:
    figures = run.figures
    first = figures.ttft.at(50) if figures.ttft else 0.0
    return (
        f"round {run.round + 1}, {run.workload}, {run.label}: "
        f"{figures.output_tokens_per_s:.1f} tokens/s, first token after {first:.2f} s"
    )


def as_results(
    plan: ComparisonPlan,
    comparisons: Sequence[Comparison],
    environments: Environments,
    command: Sequence[str] = (),
) -> Results:
    """Return what is shown and kept: all runs and ratios, the machine, everybody's versions."""
    runs = [run for each in comparisons for runs in each.runs.values() for run in runs]
    ratios = [found for each in comparisons for found in each.named_ratios()]
    kept = results("compare", runs, ratios=ratios, command=command)
    theirs = {
        f"{name}: {package}": version
        for name in plan.peers
        if (environment := PEERS[name].environment)
        for package, version in versions(environments.python(environment)).items()
    }
    return dataclasses.replace(kept, versions={**kept.versions, **theirs})
