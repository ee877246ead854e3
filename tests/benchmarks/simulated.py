"""A simulated pool: as many models and items as one likes, and the true score of every model."""

from __future__ import annotations

import numpy as np
from rules import SPLITS, World

TASKS, ITEMS, MODELS, EXPERTS = 4, 1000, 600, 4
# How much an expert is better on its own task, how much items differ, and how much the answers of two merges with the
# same coefficients do: chosen so that models disagree, and scores vary, about as much as those of the demo's search.
SKILL, HARD, OWN = 0.8, 2.2, 0.12
# Items of each task by which the true scores are computed.
TRUE = 20_000


def simulated(seed: int = 0) -> list[World]:
    """Worlds of one pool that differ in the items."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(EXPERTS, 1.5), MODELS)
    mass = rng.uniform(0.4, 1.4, (MODELS, 1))
    mixtures = np.vstack([np.eye(EXPERTS), np.full((1, EXPERTS), 1 / EXPERTS), weights * mass])
    # What distinguishes a model beyond its coefficients: good everywhere, or poor.
    bonus = rng.normal(0, 0.02, (len(mixtures), 1))
    tasks = [f"t{t}" for t in range(TASKS) for _ in range(ITEMS)]
    truth = _answers(mixtures, bonus, TRUE, np.random.default_rng([seed, 1]))
    worlds = []
    for split in range(SPLITS):
        found = _draw(mixtures, bonus, ITEMS, np.random.default_rng([seed, 2, split]))
        of = {
            "baseline": np.arange(len(mixtures)) <= EXPERTS,
            "run": np.full(len(mixtures), "random"),
            "coefficients": mixtures,
        }
        worlds.append(World("simulated", found, tasks, [f"{i}" for i in range(len(tasks))], of, split, truth))
    return worlds


def _draw(mixtures: np.ndarray, bonus: np.ndarray, items: int, rng: np.random.Generator) -> np.ndarray:
    """The answers of all models to so many items of each task, (models, tasks · items)."""
    own = np.repeat(np.eye(TASKS, EXPERTS), items, axis=0).T * SKILL
    skill = rng.normal(0, 1, (EXPERTS, TASKS * items)) + own
    hard = rng.normal(0, HARD, TASKS * items)
    noise = rng.normal(0, OWN, (len(mixtures), TASKS * items))
    return (mixtures @ skill + bonus + noise > 0.3 + 0.3 * hard).astype(np.float32)


def _answers(mixtures: np.ndarray, bonus: np.ndarray, items: int, rng: np.random.Generator) -> np.ndarray:
    """The mean answers of all models to so many items of each task, (models)."""
    parts = [_draw(mixtures, bonus, 500, rng).mean(1) for _ in range(items // 500)]
    return np.mean(parts, axis=0)
