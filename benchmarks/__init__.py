"""Comparisons and measurements: each prints one JSON line per result. Not tests."""
