"""Replicas of a server behind one address: which of them a request goes to, and what that needs."""
