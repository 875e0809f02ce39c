"""What a measure found: figures of several rounds beside their floor or peer, bars met or not, and what to draw."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RATIO = "×"


@dataclass(frozen=True, slots=True)
class Series:
    """One figure, taken once a round. `unit` is as it is shown: `ms`, `/s`, `KB`."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True, slots=True)
class Bar:
    """What must be reached, by name: a bound for the ratio, or, in another unit, for the figure itself."""

    what: str
    limit: float
    at_most: bool
    unit: str = RATIO

    def met(self, found: float) -> bool:
        return found <= self.limit if self.at_most else found >= self.limit

    @property
    def bound(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure against its floor or peer of the same rounds; without one (`floor` None) it stands for itself."""

    what: str
    subject: Series
    floor: Series | None = None
    bar: Bar | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Round by round, so that a drift of the machine's speed is in both. Empty without a floor."""
        if self.floor is None:
            return ()
        return tuple(ours / floor for ours, floor in zip(self.subject.values, self.floor.values, strict=True))

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.floor is not None else None

    @property
    def found(self) -> float:
        """What the bar is held against: the ratio, unless there is no floor or the bar is about the figure itself."""
        if self.ratio is None or (self.bar is not None and self.bar.unit != RATIO):
            return self.subject.median
        return self.ratio

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.bar.met(self.found)


@dataclass(frozen=True, slots=True)
class Table:
    """Figures that have no floor: a header, and rows of as many cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot: a line for each of `lines`, over `x`. `file` is its name in `docs/plots/`, without an ending."""

    file: str
    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    lines: Mapping[str, tuple[float, ...]]
    logarithmic: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Everything one measure found."""

    measure: str
    title: str
    comparisons: Sequence[Comparison] = ()
    tables: Sequence[Table] = ()
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = ()

    @property
    def met(self) -> bool:
        """Are all its bars met?"""
        return all(comparison.met is not False for comparison in self.comparisons)
