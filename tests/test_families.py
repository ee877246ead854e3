"""One family for each rule by which Transformers reads names, tried as the map in docs/models.md says.

``make families`` tries all families, with all abilities, and writes the map.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import toys
from abilities import Trial, Wrong, trials
from families import FAMILIES

pytestmark = pytest.mark.whole

MAP = toys.ROOT / "docs" / "models.md"
# A family, and what its files have that others have not.
RULES = {
    "Llama 2": "names as the class has them",
    "GPT-2": "no prefix, masks, transposed layers",
    "BERT": "gamma and beta",
    "T5": "tied twins",
    "Mixtral": "one tensor for each expert",
    "Qwen3-MoE": "the same under other names, more than ten",
    "GPT-NeoX": "a head of another name",
    "ViT": "names of an older class",
    "CLIP": "two towers",
    "LLaVA": "a text model inside",
}


@pytest.fixture(scope="module")
def trial_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trial]:
    """``trial_of(family)`` has the family's models saved, once for all tests. No test here scores them on items."""

    @functools.cache
    def make(name: str) -> Trial:
        folder = tmp_path_factory.mktemp("family")
        return Trial(FAMILIES[name], folder / "models", folder / "no-data")

    return make


def row(name: str) -> list[str]:
    """The cells of a family in the map."""
    found = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", MAP.read_text(), re.MULTILINE)
    assert found, f"docs/models.md has no row for {name}; run make families"
    return [cell.strip() for cell in found[1].split("|")]


@pytest.mark.parametrize("name", RULES)
def test_a_family_is_read_and_merged_as_the_map_says(name, trial_of):
    found = trials(trial_of(name), ("read", "merge"))
    assert set(found.values()) == {None}
    assert row(name)[1:3] == ["✓", "✓"]


@pytest.mark.parametrize("name", RULES)
def test_random_renamings_that_transformers_undoes_are_undone(name, trial_of):
    for seed in range(2):
        trial_of(name).renamed(seed)


def test_the_map_has_a_row_for_each_family():
    assert [name for name in FAMILIES if row(name)] == list(FAMILIES)


def test_a_wrong_merge_is_found(trial_of, monkeypatch):
    """The trial itself: weights that are not those of the reference."""
    trial = trial_of("Llama 2")
    monkeypatch.setattr("abilities.WEIGHT", {"a": 0.5, "b": 0.2})
    _ = trial.right
    made = trial._merged({"merge_method": "task_arithmetic", "models": [{"model": str(trial.folder / "a"), "parameters": {"weight": 0.5}}]}, "base", "one")  # fmt: skip  # noqa: E501
    from abilities import compare, expected

    with pytest.raises(Wrong, match="differs by"):
        compare(made, expected(trial.right))
