"""Requests for the scheduler's state machine: short, and often alike."""

from __future__ import annotations

from hypothesis import strategies as st
from tests.helpers.core_policies import NUM_ADAPTERS
from tests.helpers.limited_tenants import TERMS

# Of each its prompt, how many tokens it wants, its adapter, its terms, and seconds to its deadline.
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), min_size=1, max_size=12),
        st.integers(0, 16),
        st.integers(0, NUM_ADAPTERS),
        st.sampled_from(TERMS),
        st.sampled_from([None] * 16 + [0, 20, 60]),
    ),
    min_size=1,
    max_size=4,
)
