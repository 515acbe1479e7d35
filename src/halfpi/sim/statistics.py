"""Success rates with honest error bars, alone and paired."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Z_95 = 1.959964


@dataclass(frozen=True)
class Proportion:
    """A success rate with its 95 % Wilson score interval (Wilson 1927)."""

    successes: int
    trials: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Proportion:
        """The rate of True among `outcomes`; raises ValueError when there are none."""
        results = list(outcomes)
        if not results:
            raise ValueError("a success rate needs at least one episode")
        return cls(sum(results), len(results))

    @property
    def rate(self) -> float:
        """Successes over trials."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the interval, in [0, 1]."""
        n, p, z = self.trials, self.rate, Z_95
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """How much one setting's success rate is above another's on the same episodes.

    only_first, only_second: episodes solved in one of the two settings alone. Episodes with the
    same outcome in both carry no information on the difference, which makes it far sharper than two
    separate rates.
    """

    only_first: int
    only_second: int
    pairs: int

    @classmethod
    def of(cls, first: Mapping[Key, bool], second: Mapping[Key, bool]) -> PairedDifference:
        """Compare outcomes by episode; raises ValueError unless both hold the same episodes."""
        if first.keys() != second.keys() or not first:
            raise ValueError("paired settings must have played the same episodes")
        won = sum(second[key] and not first[key] for key in first)
        lost = sum(first[key] and not second[key] for key in first)
        return cls(lost, won, len(first))

    @property
    def difference(self) -> float:
        """The second rate minus the first."""
        return (self.only_second - self.only_first) / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wald interval of a paired difference (Agresti, Categorical Data Analysis, 11.1)."""
        discordant = self.only_first + self.only_second
        variance = max(0.0, discordant - (self.only_second - self.only_first) ** 2 / self.pairs)
        half = Z_95 * math.sqrt(variance) / self.pairs
        return self.difference - half, self.difference + half
