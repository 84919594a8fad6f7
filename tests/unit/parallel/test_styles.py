"""Every word that the installed transformers uses in a plan to spread a model is understood."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from transformers import PretrainedConfig, models

from lorax_shard.parallel.families import PLANS
from lorax_shard.parallel.plan import KNOWN_STYLES


def _configurations() -> list[type[PretrainedConfig]]:
    """Import all configurations of all families of the installed transformers."""
    found = []
    for family in pkgutil.iter_modules(models.__path__):
        name = f"transformers.models.{family.name}.configuration_{family.name}"
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found += [each for each in vars(module).values() if _is_configuration(each, name)]
    return found


def _is_configuration(value: object, module: str) -> bool:
    is_class = isinstance(value, type) and issubclass(value, PretrainedConfig)
    return is_class and value.__module__ == module


@pytest.mark.filterwarnings("ignore")
def test_every_style_of_every_family_is_known() -> None:
    plans = [getattr(each, "base_model_tp_plan", None) for each in _configurations()]
    used = {style for plan in plans for style in (plan or {}).values()}
    assert {"colwise", "rowwise"} < used
    assert used <= KNOWN_STYLES


def test_our_own_plans_use_known_styles() -> None:
    assert {style for plan in PLANS.values() for style in plan.values()} <= KNOWN_STYLES
