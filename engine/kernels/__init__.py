"""Fused CPU kernels, compiled by numba on first use. The only importer of numba; nothing imports this eagerly."""
