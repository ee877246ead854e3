"""Situations that people who merge models report in public: each gets its right answer, or one sentence refuses it."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from toys import COLOURS, DROP, SHORT, THINGS, evolver, refusal, settings, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolver import evaluate
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare

pytestmark = pytest.mark.whole

FLOAT16_MAX = 65504.0


# Merges


def merge_of(folder, models, weights, **keys):
    """A mergekit file of a linear merge of these models with these weights; returns its path."""
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "dtype": "float32", "models": entries, **keys}))
    return file


def refused_merge(file):
    """The sentence with which ``evolver merge`` refuses a file; nothing is written."""
    out = file.parent / "out"
    ended = evolver("merge", file, out)
    said = refusal(ended.code, ended.err)
    assert str(file) in said
    assert not out.exists()
    return said


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (0.5, -0.5)])
def test_weights_that_sum_to_zero_have_no_mean(models, tmp_path, weights):
    said = refused_merge(merge_of(tmp_path, [models / "a", models / "b"], weights))
    assert "models.weight" in said
    assert "sum to 0" in said
    assert "normalize: false" in said


def test_a_difference_is_merged_where_it_is_asked_for(models, tmp_path):
    """What the sentence above proposes works, and is the difference."""
    file = merge_of(tmp_path, [models / "a", models / "b"], (1.0, -1.0), parameters={"normalize": False})
    assert evolver("merge", file, tmp_path / "out").code == 0
    a, b, out = (load_file(f / "model.safetensors") for f in (models / "a", models / "b", tmp_path / "out"))
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, a[name] - b[name])


@pytest.mark.parametrize(("dtype", "weight"), [("float16", 1e7), ("float32", 3e38)])
def test_values_that_leave_the_dtype_are_counted(models, tmp_path, dtype, weight):
    keys = {"dtype": dtype, "parameters": {"normalize": False}}
    said = refused_merge(merge_of(tmp_path, [models / "a", models / "b"], (weight, weight), **keys))
    count, name = int(said.split(": ")[1].split()[0]), said.split("merged tensor ")[1].split()[0]
    a, b = (load_file(models / m / "model.safetensors")[name].double() for m in ("a", "b"))
    largest = FLOAT16_MAX if dtype == "float16" else torch.finfo(torch.float32).max
    assert count == pytest.approx(int(((weight * a + weight * b).abs() > largest).sum()), abs=2)
    assert f"not finite in {dtype}" in said


def test_shards_without_their_index(models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "model.safetensors").unlink()
    for n, part in enumerate((sorted(tensors)[:5], sorted(tensors)[5:]), 1):
        save_file({k: tensors[k] for k in part}, tmp_path / "a" / f"model-{n:05}-of-00002.safetensors")
    said = refused_merge(merge_of(tmp_path, [tmp_path / "a", models / "b"], (1.0, 1.0)))
    assert "model.safetensors.index.json" in said
    assert "model-00001-of-00002.safetensors" in said


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("gptq", {"bits": 4, "group_size": 128}),
        ("awq", {"bits": 4, "version": "gemm"}),
        ("compressed-tensors", {"format": "float-quantized"}),
    ],
)
def test_quantised_weights_are_named_as_such(models, tmp_path, method, settings):
    shutil.copytree(models / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    packed = tensors[name].numel() // 2
    tensors |= {name: torch.zeros(packed, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(packed // 32)}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    said = refused_merge(merge_of(tmp_path, [models / "b", tmp_path / "a"], (1.0, 1.0)))
    assert f"{tmp_path / 'a'} are quantised ({method})" in said
    assert "give the model that was quantised" in said


# Tasks


def documents(count, seed=0):
    draw = random.Random(seed)
    options = [f"{c} {t}" for c in COLOURS for t in THINGS]
    return [
        {"question": f"{seed} {n} {draw.choice(THINGS)}?", "choices": draw.sample(options, 4), "answer": n % 4}
        for n in range(count)
    ]


def task(folder, name, rows, text="Q: {{question}}\nA:", **more):
    """A multiple-choice task of lm-eval over these documents."""
    given = {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": write_rows(folder / f"{name}.jsonl", rows)}},
        "doc_to_text": text, "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**given, **more}))


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


def lm_eval_says(model, folder, name):
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=1,
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)["results"][name]["acc,none"]


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_weighs_its_tasks_as_it_says(make_config, models, own, by_size):
    task(own, "search", documents(30, 1))
    task(own, "many", documents(30, 2))
    task(own, "few", documents(10, 3))
    means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
    (own / "group.yaml").write_text(
        yaml.safe_dump({"group": "group", "task": ["many", "few"], "aggregate_metric_list": means})
    )
    tasks = [{"task": "search", "report_task": "group", "metric": "acc", "dev": 30, "report": 40}]
    config = make_config(own.parent, {"evaluation.include_path": str(own), "evaluation.tasks": tasks})
    for found in evaluate(config, [models / "a", models / "b"]):
        assert found.score == pytest.approx(lm_eval_says(found.model, own, "group"), abs=1e-9)


def test_exactly_as_many_written_examples_as_a_prompt_wants(make_config, models, own):
    shown = {"num_fewshot": 3, "fewshot_config": {"sampler": "first_n", "samples": documents(3, 9)}}
    task(own, "search", documents(30, 1), **shown)
    task(own, "final", documents(30, 2), **shown)
    tasks = [{"task": "search", "report_task": "final", "metric": "acc", "dev": 30, "report": 30}]
    config = make_config(own.parent, {"evaluation.include_path": str(own), "evaluation.tasks": tasks})
    assert evolver("validate", config).code == 0
    for found in evaluate(config, [models / "a", models / "b"]):
        assert found.score == pytest.approx(lm_eval_says(found.model, own, "final"), abs=1e-9)


@pytest.mark.parametrize("counts", [((10, 10), (5, 5)), ((5, 5), (10, 10)), ((20, 4), (3, 16)), ((1, 1), (20, 10))])
def test_no_document_is_searched_on_for_one_task_and_reported_on_for_another(make_config, own, counts):
    rows = documents(40)
    task(own, "ask", rows)
    task(own, "tell", rows, text="{{question}}")
    tasks = [
        {"task": name, "metric": "acc", "dev": dev, "report": report}
        for name, (dev, report) in zip(("ask", "tell"), counts, strict=True)
    ]
    config = make_config(own.parent, {"evaluation.include_path": str(own), "evaluation.tasks": tasks})
    items = prepare(config_at(config)).tasks.items
    assert {len(items.dev), len(items.report)} == {sum(c[0] for c in counts), sum(c[1] for c in counts)}
    assert not {i.hash for i in items.dev} & {i.hash for i in items.report}


# Configurations


def counted(**more):
    """A change of the tasks: the toy, with these keys."""
    return {"evaluation.tasks": [{"task": "toy", "dev": 4, "report": 4, **more}]}


ODD = {
    "equal masses": ({"baselines.masses": [1.0, 1.0]}, "baselines.masses"),
    "masses that differ too little": ({"baselines.masses": [1.0, 1.0 + 1e-12]}, "baselines.masses"),
    "many threads": ({"evaluation.threads": 10**6}, "evaluation.threads"),
    "countless threads": ({"evaluation.threads": 10**30}, "evaluation.threads"),
    "huge cache": ({"pool.cache_gb": 1e308}, "pool.cache_gb"),
    "long time-out": ({"pool.timeout_s": 1e30}, "pool.timeout_s"),
    "huge population": ({"search.population": 10**30}, "search.population"),
    "countless generations": ({"search.generations": 10**30}, "search.generations"),
    "countless candidates": ({"budget.candidates": 10**30}, "budget.candidates"),
    "countless items": ({"budget.items": 10**30}, "budget.items"),
    "countless workers": ({"pool.workers": 10**30}, "pool.workers"),
    "huge seed": ({"seed": 10**40}, "seed"),
    "wrong kind": ({"model.kind": "seq2seq"}, "model.kind"),
    "report data alone": (counted(report_data="x"), "report_data"),
    "empty report task": (counted(report_task=""), "report_task"),
    "long path": ({"model.base": "x" * 5000}, "model.base"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_value_that_cannot_work_is_refused_by_both_commands(make_config, tmp_path, name):
    changes, key = ODD[name]
    file = make_config(tmp_path, changes)
    said = []
    for call in (("validate", file), ("run", file, "--results", tmp_path / "results")):
        ended = evolver(*call)
        said.append(refusal(ended.code, ended.err))
    assert said[0] == said[1]
    assert key in said[0]
    assert not (tmp_path / "results" / "toy").exists()


def test_a_run_that_scored_nothing_gives_its_name_to_the_mended_configuration(models, tasks, tmp_path):
    results = tmp_path / "results"
    file = tmp_path / "run.yaml"
    for shots, code in ((100, 2), (2, 0)):
        given = {**SHORT, "evaluation.num_fewshot": shots, "baselines.masses": DROP}
        file.write_text(yaml.safe_dump(settings(models, tasks, given)))
        ended = evolver("run", file, "--results", results)
        assert ended.code == code, ended.err
        assert (results / "toy").exists() == (code == 0)


def test_export_writes_over_nothing(models, tasks, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(models, tasks, SHORT)))
    run = tmp_path / "results" / "toy"
    assert evolver("run", file, "--results", run.parent).code == 0
    taken = tmp_path / "taken"
    (taken / "below").mkdir(parents=True)
    (taken / "below" / "diary.txt").write_text("mine")
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    for target in (taken, taken / "below" / "diary.txt", run, run / "ledger", run / "new", run.parent):
        for force in ((), ("--force",)):
            ended = evolver("export", run, target, *force)
            assert str(target) in refusal(ended.code, ended.err)
    assert (taken / "below" / "diary.txt").read_text() == "mine"
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
