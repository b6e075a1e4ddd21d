"""Curves of any length to as many points as a chart can show."""

import itertools
from collections.abc import Sequence

import numpy as np

MOST_POINTS = 1500
"""Of a curve: about twice the columns of a chart."""


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of a curve, and of each stretch its lowest and its highest point, so that no spike is lost.

    Args:    xs: ascending; ys: finite, as long; most: points, at least 4.
    Returns: both float64, at most `most` long, in order; short curves as they are.
    """
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2).astype(int)
    kept = {0, len(x) - 1}
    for first, end in itertools.pairwise(edges):
        kept |= {first + int(y[first:end].argmin()), first + int(y[first:end].argmax())}
    order = sorted(kept)
    return x[order], y[order]


def bin_means(xs: Sequence[float], ys: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over stretches of as many steps each, for bars, which do not overlap.

    Args:    xs: [n]; ys: [n, k]; most: stretches.
    Returns: the first x of each stretch, and the means [stretches, k].
    """
    x, size = np.asarray(xs, float), -(-len(xs) // most) if len(xs) else 1
    starts = np.arange(0, len(x), size)
    means = [ys[start : start + size].mean(axis=0) for start in starts]
    return x[starts], np.array(means).reshape(len(starts), ys.shape[1])
