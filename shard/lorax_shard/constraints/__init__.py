"""Outputs bound to a grammar: matchers beside the steps, and masks for those who draw."""
