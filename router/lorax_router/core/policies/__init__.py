"""Scheduling policies behind one interface: who is admitted next, and who gives way."""
