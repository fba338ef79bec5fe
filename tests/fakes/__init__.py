"""Fakes that behave: they speak the real protocols with scripted answers."""
