"""Times of several ways to do the same thing, measured in turn, so that a busy machine slows all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def alternately(
    functions: Mapping[str, Callable[[], object]], times: int, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, list]]:
    """Call every function once and then `times` more. Return the seconds of these, and the values of all calls."""
    seconds, values = {name: [] for name in functions}, {name: [] for name in functions}
    for _ in range(times + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            values[name].append(function())
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: measured[1:] for name, measured in seconds.items()}, values


def median_seconds(function: Callable[[], object], times: int = 5) -> float:
    """Return the median time of a call, after one that does not count."""
    return median(alternately({"": function}, times)[0][""])
