"""Faults, overload and attackers: what a server goes through without harm."""
