"""Settings of a merger that evolve beside the population that it merges."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evolver.records import Knob

# Of a setting's range, as the first step of cmaes. With these bounds no setting freezes, and none is drawn blindly.
FIRST_STEP, SMALLEST_STEP, LARGEST_STEP = 1 / 6, 0.01, 0.5
SIGNIFICANT = 6  # digits of a drawn number, so that logarithms of another processor give the same recipes


@dataclass(frozen=True)
class AdaptingSettings:
    """The values of the settings, and the step by which the next ones are drawn around them.

    A candidate draws its step and then its settings, and both stay if it is accepted: self-adaptation (Schwefel 1981;
    Beyer and Schwefel 2002, section 4.2). With n settings, each in a range of width 1, on a log scale where the method
    says so:

        σ' = σ · exp(N(0, 1) / √n)        s' = s + σ' · N(0, 1), reflected at the ends of the range

    Attributes:
        knobs: the settings and their ranges.
        values: by the name of the setting.
        step: σ.
    """

    knobs: Sequence[Knob]
    values: Mapping[str, float]
    step: float = FIRST_STEP

    def varied(self, draw: random.Random) -> AdaptingSettings:
        """What a candidate draws around these."""
        if not self.knobs:
            return self
        step = self.step * math.exp(draw.normalvariate() / math.sqrt(len(self.knobs)))
        step = min(max(step, SMALLEST_STEP), LARGEST_STEP)
        values = {k.name: _moved(k, self.values[k.name], step * draw.normalvariate()) for k in self.knobs}
        return replace(self, values=values, step=step)


def _moved(knob: Knob, value: float, by: float) -> float:
    """The value moved by a part of its range."""
    low, high = (math.log(knob.low), math.log(knob.high)) if knob.log else (knob.low, knob.high)
    place = ((math.log(value) if knob.log else value) - low) / (high - low) + by
    folded = abs(place) % 2.0  # a reflection at both ends has period 2
    found = low + (high - low) * min(folded, 2.0 - folded)
    number = float(f"{math.exp(found) if knob.log else found:.{SIGNIFICANT}g}")
    return min(max(number, knob.low), knob.high)
