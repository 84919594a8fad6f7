"""Mixtures of experts: how their modules keep them, and how they are computed."""
