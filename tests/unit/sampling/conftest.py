"""Each way to draw, for the tests that hold for all of them."""

import functools

import pytest
from tests.helpers.sampling_methods import NAMES, method_of

from lorax_shard.sampling.sampler import Sampler


@pytest.fixture(params=NAMES)
def make_sampler(request):
    """What makes samplers that draw in one of the ways."""
    try:
        return functools.partial(Sampler, method=method_of(request.param))
    except OSError as error:
        pytest.skip(str(error))
