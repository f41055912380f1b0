"""Measured tiles: device kind -> shape class -> (queries, warps). Written by `python -m
pallas_kernels.tuner --write`.
"""

TABLE: dict[str, dict[str, tuple[int, int]]] = {}
