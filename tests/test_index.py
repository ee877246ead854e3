"""lm-eval's library by a search of its text is the library that lm-eval reads in ten seconds."""

import logging

import pytest
from lm_eval.tasks import TaskManager

from evolver.evaluation.language.index import Index, manager_of, members

pytestmark = pytest.mark.whole

NAMES = (
    "arc_easy", "gsm8k", "glue", "super-glue-lm-eval-v1", "acp_bench", "adr_tasks", "bbh", "leaderboard",
    "AraDiCE_boolq_egy", "flan_held_in", "minerva_math", "mmlu_pro", "truthfulqa_mc2",
)  # fmt: skip


@pytest.fixture(scope="module")
def everything():
    logging.disable(logging.CRITICAL)
    yield TaskManager()
    logging.disable(logging.NOTSET)


def meaning(manager, name, seen):
    """What a name is to a manager, and all that belongs to it."""
    if name not in seen:
        entry = manager.task_index.get(name)
        seen[name] = entry and (entry.kind, entry.yaml_path, repr(entry.cfg), entry.kind.name == "TAG" and entry.tags)
        below = {"GROUP": members(entry.cfg or {}), "TAG": entry.tags}.get(entry.kind.name, ()) if entry else ()
        for member in below:
            meaning(manager, member, seen)
    return seen


def test_it_knows_every_name(everything):
    names = set(Index().names)
    assert len(names) > 10_000
    assert {name for name in everything.all_tasks if name not in names} == set()


def test_a_name_means_the_same(everything):
    index = Index()
    known = [name for name in NAMES if name in everything.task_index]
    assert len(known) > 10
    for name in known:
        assert meaning(manager_of([name], None, index), name, {}) == meaning(everything, name, {}), name


def test_a_folder_of_one_s_own_goes_first(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: arc_easy\ndataset_path: json\noutput_type: multiple_choice\n")
    assert manager_of(["arc_easy"], str(tmp_path), Index()).task_index["arc_easy"].yaml_path.parent == tmp_path
