"""The configuration: what loads, and that every complaint names the file, the key and what to write instead."""

import pytest
import yaml

from evolver.config import PoolSettings
from evolver.config.changes import differences
from evolver.config.reading import check_section, load
from evolver.errors import BadInput, nearest

GOOD = """
run: try
seed: 3
model: {base: models/base, dtype: bfloat16}
experts: {math: models/math, code: models/code}
search: {algorithm: evolver, generations: 2}
budget: {candidates: 20}
evaluation:
  tasks:
    - {task: arc_easy, dev: 100, report: 200}
    - {task: piqa, metric: acc_norm, weight: 2, dev: 50, report: 60}
"""


@pytest.fixture
def complaint(tmp_path):
    """What ``load`` says of a text, or of GOOD with one part replaced."""

    def say(old, new=None):
        text = old if new is None else GOOD.replace(old, new)
        assert text != GOOD
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(BadInput) as caught:
            load(file)
        said = str(caught.value)
        assert said.startswith(f"{file}: ")
        assert "\n" not in said
        return said

    return say


def test_a_good_file_loads(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    config = load(file)
    assert config.run == "try"
    assert config.seed == 3
    assert list(config.experts) == ["math", "code"]
    assert config.search == {"algorithm": "evolver", "generations": 2}
    assert [t.weight for t in config.evaluation.tasks] == [1.0, 2.0]
    assert config.evaluation.batch_tokens == 2048
    assert config.pool.kind == "auto"
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4


def test_a_power_of_ten_is_a_number_with_and_without_a_dot(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD.replace("generations: 2", "generations: 2, F: 1e-3, Cr: 5E+1, name: e-3"))
    assert load(file).search == {"algorithm": "evolver", "generations": 2, "F": 0.001, "Cr": 50.0, "name": "e-3"}


def test_anchors_and_merge_keys_are_yaml_too(tmp_path):
    file = tmp_path / "good.yaml"
    both = "    - &one {task: arc_easy, dev: 100, report: 200}\n    - {<<: *one, task: piqa}\n"
    file.write_text(GOOD.split("    - {task")[0] + both)
    assert [(t.task, t.dev) for t in load(file).evaluation.tasks] == [("arc_easy", 100), ("piqa", 100)]


@pytest.mark.parametrize(
    ("old", "new", "key", "remedy"),
    [
        ("seed: 3", "sede: 3", "sede: unknown key", "'seed'"),
        ("dtype: bfloat16", "dtpye: bfloat16", "model.dtpye: unknown key", "'dtype'"),
        ("weight: 2", "wieght: 2", "evaluation.tasks[1].wieght: unknown key", "'weight'"),
        ("candidates: 20", "candidate: 20", "budget.candidate: unknown key", "'candidates'"),
        ("seed: 3", "seed: three", "seed: 'three' is not usable", "write an integer"),
        ("seed: 3", "seed: 3.5", "seed: 3.5 is not usable", "integer"),
        ("seed: 3", "seed: -1", "seed: -1 is not usable", "write a number greater than or equal to 0"),
        ("dev: 100", "dev: 0", "evaluation.tasks[0].dev: 0 is not usable", "a number greater than or equal to 1"),
        ("dtype: bfloat16", "dtype: int8", "model.dtype: 'int8' is not usable", "'float32', 'bfloat16' or 'float16'"),
        ("run: try", "run: a/b", "run: 'a/b' is not usable", "write letters, digits, '.', '_' and '-', with a letter"),
        ("task: piqa", "task: ''", "evaluation.tasks[1].task: '' is not usable", "write text of at least 1 character"),
        ("run: try\n", "", "run: this key is missing", "add it (name of the run"),
        ("base: models/base, ", "", "model.base: this key is missing", "add it (the base: its Hugging Face folder"),
        ("task: arc_easy, ", "", "evaluation.tasks[0].task: this key is missing", "name of an lm-eval task"),
        (", code: models/code", "", "experts: ", "give at least two experts"),
        ("{math:", "{base:", "experts: 'base' cannot be the name", "none of the names base, average"),
        ("{candidates: 20}", "{}", "budget: ", "give candidates, items, minutes or patience"),
        ("algorithm: evolver, ", "", "search: ", "'algorithm'"),
        ("task: piqa", "task: arc_easy", "evaluation: task 'arc_easy' is listed twice", "list it once"),
        ("{candidates: 20}", "20", "budget: 20 is not usable", "mapping with the keys candidates, items, minutes"),
        (
            "task: piqa",
            "task: 3",
            "evaluation.tasks[1].task: 3 is not usable",
            "write text (in quotes, if it looks like",
        ),
        ("dev: 100,", "dev: 100, data: 3,", "evaluation.tasks[0].data: 3 is not usable", "write text"),
        (
            "dev: 100,",
            "dev: 100, data: {path: x},",
            "evaluation.tasks[0].data.split: this key is missing",
            "such as test",
        ),
        ("dev: 100,", "dev: 100, data: {pat: x},", "evaluation.tasks[0].data.pat: unknown key", "'path'"),
        ("dev: 100,", "dev: 100, function: f,", "evaluation.tasks[0].function: 'f' is not usable", "FILE.py:NAME"),
        ("run: try", "run: try\npool: {resources: 3}", "pool.resources: 3 is not usable", "write a mapping."),
        ("budget:", "baselines: {masses: [0]}\nbudget:", "baselines.masses: ", "at least one mass, all above 0"),
    ],
)
def test_a_complaint_names_key_and_remedy(complaint, old, new, key, remedy):
    said = complaint(old, new)
    assert key in said
    assert remedy in said.partition(key)[2]


def test_an_empty_list_of_tasks_is_refused(complaint):
    said = complaint(GOOD.split("  tasks:")[0] + "  tasks: []\n")
    assert "evaluation.tasks: [] is not usable; write a list of at least 1 item." in said


def test_a_key_that_stands_twice_is_refused(complaint):
    assert "key 'seed' appears twice" in complaint("seed: 3", "seed: 3\nseed: 4")
    assert "key 'math' appears twice" in complaint("{math: models/math,", "{math: models/math, math: x,")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_what_is_no_mapping_is_refused(complaint, text):
    said = complaint(text)
    assert "must be a mapping with the keys run, seed, order, model, experts" in said


def test_broken_yaml_is_refused(complaint):
    assert "not valid YAML" in complaint("run: [1, 2")
    assert "not valid YAML" in complaint("a: 1\n b: 2")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(BadInput, match=r"cannot be read .*give the path of a YAML file") as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_a_section_is_named_with_its_prefix():
    with pytest.raises(BadInput, match=r"^f\.yaml: search\.num_worker: unknown key; did you mean 'num_workers'"):
        check_section(PoolSettings, {"num_worker": 1}, "f.yaml", "search.")


def test_yaml_is_safe(complaint):
    assert "not valid YAML" in complaint("run: !!python/object/apply:os.getcwd []")


def test_differences():
    old = yaml.safe_load("{a: 1, b: {c: 2, d: {e: 3}}, f: [1, 2]}")
    new = yaml.safe_load("{a: 1, b: {c: 5, d: {}}, f: [1, 3], g: 0}")
    assert list(differences(old, new)) == [("b.c", 2, 5), ("b.d.e", 3, None), ("f", [1, 2], [1, 3]), ("g", None, 0)]
    assert list(differences(old, old)) == []


def test_a_misspelt_word_gets_its_nearest():
    assert nearest("wieght", ["weight", "density"]) == "did you mean 'weight'?"
    assert nearest("zzz", ["weight", "density"]) == "known: density, weight"
    assert nearest("zzz", [2, "b", 0.5]) == "known: 0.5, 2, b"
    assert nearest("zzz", []) == "there are no known names here"
