"""Configurations near a valid one: ``validate`` and ``run`` agree, and what is refused is refused in one sentence."""

from __future__ import annotations

import near
import pytest
import toys
import yaml
from toys import SHORT, evolver, refusal

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("seed", range(48))
def test_what_is_checked_is_what_runs(models, tasks, tmp_path, seed):
    config, key = near.mutated(toys.settings(models, tasks, SHORT), seed, near.OPTIONAL)
    file = tmp_path / "near.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    checked = evolver("validate", file)
    ran = evolver("run", file, "--results", tmp_path / "results")
    assert checked.code in (0, 2), checked
    assert ran.code == checked.code, (key, checked, ran)
    if checked.code == 2:
        said = refusal(checked.code, checked.err)
        assert file.name in said
        named = [part for part in key.replace("]", "").replace("[", ".").split(".") if not part.isdigit()]
        assert any(part in said for part in named), (key, said)
        assert not (tmp_path / "results").exists()
