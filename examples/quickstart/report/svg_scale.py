"""Scales of small charts: axes with round ticks, ranges with air, short numbers, fewer points."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round numbers inside the axis."""
        if not self.log:
            raw = (self.high - self.low) / count
            step = 10 ** math.floor(math.log10(raw))
            step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= raw * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            found = [m * 10.0**p for p in powers for m in multiples]
            found = [t for t in found if self.low * 0.999 <= t <= self.high * 1.001]
            if len(found) >= 3:
                return found
        return Axis(self.low, self.high, self.start, self.end).ticks(count)


def span(values: Iterable[float], pad: float = 0.06, log: bool = False) -> tuple[float, float]:
    """Low and high of finite values with some air around them; never empty."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(finite), max(finite)) if finite else (0.1 if log else 0.0, 1.0)
    if log:
        air = max((high / low) ** pad, 1.1)
        return low / air, high * air
    air = (high - low) * pad or abs(high) * pad or 0.5
    return low - air, high + air


def number(value: float) -> str:
    """Short form of a tick or a value."""
    return f"{value:.6g}" if abs(value) < 1e4 else f"{value / 1e3:.4g}k"


def running_mean(points: list[Point], window: int) -> list[Point]:
    """Mean of the last `window` values at each point; values that are not finite are left out."""
    means: list[Point] = []
    recent: list[float] = []
    for x, y in points:
        if math.isfinite(y):
            recent = [*recent[-(window - 1) :], y] if window > 1 else [y]
            means.append((x, sum(recent) / len(recent)))
    return means


def thin(points: list[Point], most: int = 400) -> list[Point]:
    """At most `most` points: means of equal runs, first and last kept."""
    if len(points) <= most:
        return points
    step = math.ceil(len(points) / (most - 2))
    runs = [points[i : i + step] for i in range(0, len(points), step)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [points[0], *means, points[-1]]
