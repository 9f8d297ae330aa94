"""The measures in plain loops over float64 numbers, as docs/fidelity.md words them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def _rows(arrays: list[np.ndarray]) -> list[list[list[float]]]:
    return [each.astype(np.float64).tolist() for each in arrays]


def sigmas(arrays: list[np.ndarray], others: list[np.ndarray] | None = None) -> list[float]:
    """Of every channel, over finite tokens but the first of each sample."""
    tokens = []
    for sample, other in zip(_rows(arrays), _rows(others or arrays), strict=True):
        for token, (row, beside) in enumerate(zip(sample, other, strict=True)):
            if token > 0 and all(map(math.isfinite, row + beside)):
                tokens.append(row)
    found = []
    for channel in range(len(tokens[0])):
        column = [row[channel] for row in tokens]
        mean = math.fsum(column) / len(column)
        found.append(math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column)))
    floor = float(np.median([each for each in found if each > 0])) / 4096
    return [max(each, floor) for each in found]


def state_measures(a: list[np.ndarray], b: list[np.ndarray]) -> dict[str, Any]:
    """Of one layer, of all samples."""
    sigma = sigmas(a, b)
    squares, in_sigma, plain, relative, cosines, neighbours = [], [], [], [], [], []
    num_not_finite = num_misplaced = num_from_zero = num_to_zero = 0
    for sample, other in zip(_rows(a), _rows(b), strict=True):
        whole = []
        for row, restored in zip(sample, other, strict=True):
            for channel, (x, y) in enumerate(zip(row, restored, strict=True)):
                num_not_finite += not math.isfinite(x)
                if not (math.isfinite(x) and math.isfinite(y)):
                    num_misplaced += not (x == y or (math.isnan(x) and math.isnan(y)))
                    continue
                error = abs(y - x)
                plain.append(error)
                squares.append((error / sigma[channel]) ** 2)
                in_sigma.append(error / sigma[channel])
                num_to_zero += x != 0 and y == 0
                if x != 0:
                    relative.append(error / abs(x))
                else:
                    num_from_zero += y != 0
            if all(map(math.isfinite, row + restored)):
                whole.append((row, restored))
        cosines += [_cosine(row, restored) for row, restored in whole]
        neighbours += _neighbours([row for row, _ in whole], [each for _, each in whole])
    return {
        "num_values": len(squares),
        "nrmse": math.sqrt(math.fsum(squares) / len(squares)),
        "max_sigma": max(in_sigma),
        "max_error": max(plain),
        "max_relative": max(relative),
        "num_from_zero": num_from_zero,
        "num_to_zero": num_to_zero,
        "num_tokens": len(cosines),
        "mean_cosine": math.fsum(cosines) / len(cosines),
        "min_cosine": min(cosines),
        "num_neighbours": len(neighbours),
        "neighbour_agreement": sum(neighbours) / len(neighbours),
        "num_not_finite": num_not_finite,
        "num_misplaced": num_misplaced,
    }


def _cosine(x: list[float], y: list[float]) -> float:
    lengths = math.sqrt(sum(each * each for each in x)) * math.sqrt(sum(each * each for each in y))
    return sum(p * q for p, q in zip(x, y, strict=True)) / lengths


def _neighbours(a: list[list[float]], b: list[list[float]]) -> list[bool]:
    """For every token with another one, whether a nearest one is the same."""
    if len(a) < 2:
        return []

    def nearest(rows: list[list[float]], token: int) -> set[int]:
        cosines = {
            other: _cosine(rows[token], rows[other]) for other in range(len(rows)) if other != token
        }
        return {other for other, each in cosines.items() if each >= max(cosines.values()) - 1e-6}

    return [bool(nearest(a, token) & nearest(b, token)) for token in range(len(a))]


def difference_nrmse(
    a: list[np.ndarray], b: list[np.ndarray], a_before: list[np.ndarray], b_before: list[np.ndarray]
) -> float:
    """Of finite arrays."""
    steps = [
        x.astype(np.float64) - before.astype(np.float64)
        for x, before in zip(a, a_before, strict=True)
    ]
    restored = [
        y.astype(np.float64) - before.astype(np.float64)
        for y, before in zip(b, b_before, strict=True)
    ]
    sigma = sigmas(steps)
    squares = [
        ((y - x) / sigma[channel]) ** 2
        for sample, other in zip(_rows(steps), _rows(restored), strict=True)
        for row, beside in zip(sample, other, strict=True)
        for channel, (x, y) in enumerate(zip(row, beside, strict=True))
    ]
    return math.sqrt(math.fsum(squares) / len(squares))


def weight_measures(a: list[np.ndarray], b: list[np.ndarray], threshold: float) -> dict[str, Any]:
    """Of one layer, of all samples: ``(heads, query, key)``."""
    errors, values, relative, divergences = [], [], [], []
    num_edges = num_added = num_removed = num_from_zero = num_to_zero = 0
    for sample, other in zip(a, b, strict=True):
        heads, queries, keys = sample.shape
        for query in range(queries):
            for key in range(min(query + 1, keys)):
                means = [
                    np.float32(sum(float(each[head, query, key]) for head in range(heads)) / heads)
                    for each in (sample, other)
                ]
                before, after = (each > np.float32(threshold) for each in means)
                num_edges += before
                num_added += after and not before
                num_removed += before and not after
            for head in range(heads):
                row = [float(each) for each in sample[head, query]]
                restored = [float(each) for each in other[head, query]]
                divergences += _divergence(row, restored)
                for x, y in zip(row, restored, strict=True):
                    errors.append(abs(y - x))
                    values.append(x)
                    relative += [abs(y - x) / x] if x else []
                    num_from_zero += x == 0 and y != 0
                    num_to_zero += x != 0 and y == 0
    size = math.fsum(each * each for each in values)
    return {
        "num_values": len(values),
        "nrmse": math.sqrt(math.fsum(each * each for each in errors) / size),
        "rms": math.sqrt(size / len(values)),
        "max_error": max(errors),
        "max_relative": max(relative),
        "num_from_zero": num_from_zero,
        "num_to_zero": num_to_zero,
        "num_edges": num_edges,
        "num_added": num_added,
        "num_removed": num_removed,
        "num_rows": len(divergences),
        "mean_kl": math.fsum(divergences) / len(divergences),
        "max_kl": max(divergences),
    }


def _divergence(row: list[float], restored: list[float]) -> list[float]:
    if not sum(row):
        return []
    kept = [y or (min(x, 2.0**-24) if x else 0.0) for x, y in zip(row, restored, strict=True)]
    p = [x / sum(row) for x in row]
    q = [y / sum(kept) for y in kept]
    return [sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x)]
