"""Numbers, tables and recipes as a report writes them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence

from evolver.config import Budget, PoolSettings
from evolver.config.evaluation import EvaluationSettings
from evolver.evaluation.scores.metrics import Metric
from evolver.evaluation.scores.scoring import Scale


def cost_rows(pool: PoolSettings, seconds: float) -> list[list[str]]:
    """Energy and costs, if the configuration says how much power and money a worker takes."""
    hours = seconds / 3600
    energy = [] if pool.watts is None else [["energy (kWh, estimated)", f"{pool.watts * hours / 1000:.4f}"]]
    price = [] if pool.price_per_hour is None else [["price (estimated)", f"{pool.price_per_hour * hours:.4f}"]]
    return energy + price


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# Characters that have a meaning in Markdown or HTML; an underscore within a word has none.
MARKED = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")
# What a search saw on a part of the items, by the kind of the estimates.
_ESTIMATES = {"mean": "the means", "difference": "estimates without bias (the difference estimator)"}


def escaped(text: str) -> str:
    """A text from outside in one line, escaped so that Markdown shows it unchanged in paragraphs, lists and tables."""
    return MARKED.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def fenced(text: str) -> str:
    """A text of several lines from outside, as a block that Markdown shows unchanged."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def score_text(value: float | None, scale: Scale) -> str:
    """A score: in percent where all metrics are shares."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if scale.shares else f"{value:.4g}"


def signed(value: float, scale: Scale) -> str:
    """A difference of scores, with its sign."""
    return f"{100 * value:+.1f}" if scale.shares else f"{value:+.4g}"


def points(value: float, scale: Scale) -> str:
    """A difference of scores in points, without a sign."""
    return f"{100 * value:.1f}" if scale.shares else f"{value:.4g}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words as a list in a sentence: a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def of_task(value: float | None, metric: Metric) -> str:
    """A task's metric, with the sign that the field gives it."""
    if value is None:
        return "–"
    value = 0.0 - value if metric.negative else value  # 0 has no sign
    return f"{100 * value:.1f}" if metric.points else f"{value:.4g}"


def budget_in_words(budget: Budget) -> str:
    """The limits of a budget, as the end of a sentence."""
    words = {
        "candidates": "{} candidates", "items": "{} items", "minutes": "{:g} minutes",
        "patience": "{} candidates in a row without an improvement", "target": "a target of {}",
    }  # fmt: skip
    *first, last = (words[key].format(limit) for key, limit in budget.limits.items())
    return " and ".join(filter(None, [", ".join(first), last]))


def as_served(settings: EvaluationSettings) -> str:
    """A sentence that says after which quantisation models were scored; empty where there was none."""
    if settings.quantise is None:
        return ""
    whom = "Candidates and finalists" if settings.quantise_search else "On the report items, the finalists"
    return f"{whom} were scored as they are after quantisation to {settings.quantise}."


def as_seen(settings: EvaluationSettings) -> str:
    """What the search saw of the answers to dev items, where that is not their score."""
    said = []
    if (estimate := settings.estimate) is not None:
        how = _ESTIMATES.get(estimate.kind, f"item-response estimates ({estimate.kind})")
        said.append(
            f"Each candidate was scored on {estimate.items} of the dev items, and the search saw {how} instead of "
            "whole scores; its best candidates were then scored on all dev items."
        )
    if settings.fitness != "score":
        said.append(
            f"What counts of an answer to a dev item is the probability of the right one"
            f"{', averaged with the score' if settings.fitness == 'both' else ''}."
        )
    return " ".join(said)


def median_or_zero(values: Iterable[float]) -> float:
    """The median; 0 if there are no values."""
    found = list(values)
    return statistics.median(found) if found else 0.0


def layers_in_words(layers: tuple[int, int]) -> str:
    """The layers from the first number to before the second: ``layer 3``, ``layers 0 to 5``."""
    first, last = layers[0], layers[1] - 1
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def part_in_words(part: tuple[int, int]) -> str:
    """One of the parts that the rows of a tensor are divided into: ``rows 1/8``, the first of eight."""
    return f"rows {part[0] + 1}/{part[1]}"
