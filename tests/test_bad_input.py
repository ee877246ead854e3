"""Every bad input ends with status 2 and one sentence that names file or key and what to write instead."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import toys
import yaml
from toys import DROP

from cluster.command import run_job
from evolver.commands.evaluate import score_models
from evolver.errors import BadInput

SECONDS = 5.0  # of a processor: what else a machine does is not ours


@pytest.fixture(autouse=True)
def _keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def make_huge(folder, shards, gib):
    """A whole checkpoint, of which the disk holds nothing but the headers."""
    (folder / "model.safetensors").unlink()
    shape = [1 << 18, gib << 10]
    end = 4 * shape[0] * shape[1]
    files = {f"model.layers.{k}.weight": f"model-{k}.safetensors" for k in range(shards)}
    for name, file in files.items():
        header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})
        with (folder / file).open("wb") as handle:
            handle.write(len(header).to_bytes(8, "little") + header.encode())
            handle.truncate(8 + len(header) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def spoil_bases(copy, edit):
    """Bases whose description or tokenizer is wrong, by ``copy(name)`` of a whole one."""
    for name, change in {
        "of-no-type": {"model_type": None}, "of-an-unknown-type": {"model_type": "llamma"},
        "of-words": {"hidden_size": "64"}, "narrower": {"hidden_size": 32}, "deeper": {"num_hidden_layers": 3},
        "bottomless": {"num_hidden_layers": 10**9}, "headless": {"num_attention_heads": 0},
        "untied": {"tie_word_embeddings": False}, "unread": {"max_position_embeddings": 0},
        "of-no-number": {"rms_norm_eps": float("nan")},
    }.items():  # fmt: skip
        edit(copy(name) / "config.json", lambda raw, change=change: raw.update(change))
    (copy("mute") / "tokenizer.json").unlink()
    (copy("stuttering") / "tokenizer_config.json").write_text("[]")
    edit(copy("wordless") / "tokenizer.json", lambda raw: raw.update(model=None))
    (copy("unfinished") / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content ")
    (copy("deaf") / "chat_template.jinja").write_text("Hello!")


@pytest.fixture(scope="module")
def spoilt(models, tasks, tmp_path_factory):
    """Folders that are no usable experts, by name."""
    folder = tmp_path_factory.mktemp("spoilt")

    def copy(name):
        return shutil.copytree(models / "a", folder / name)

    def edit(file, change):
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))

    def copy_base(name):
        return shutil.copytree(models / "base", folder / name)

    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    edit(copy("gpt") / "config.json", lambda raw: raw.update(model_type="gpt2"))
    edit(copy("words") / "tokenizer.json", lambda raw: raw["added_tokens"].append({"id": 999, "content": "<new>"}))
    copy("pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    copy("hollow")
    (folder / "hollow" / "model.safetensors").unlink()
    copy("garbled")
    (folder / "garbled" / "config.json").write_text("{")
    (folder / "nothing").mkdir()
    shutil.copytree(models / "lora", folder / "dora")
    edit(folder / "dora" / "adapter_config.json", lambda raw: raw.update(use_dora=True))
    shutil.copytree(models / "lora", folder / "biased")
    edit(folder / "biased" / "adapter_config.json", lambda raw: raw.update(lora_bias=True))
    (folder / "file").write_text("not a folder")
    spoil_bases(copy_base, edit)
    shutil.copytree(tasks, folder / "tasks")
    make_huge(copy("many"), shards=40, gib=16)
    make_huge(copy("huge"), shards=1, gib=8192)
    lost = yaml.safe_load((tasks / "toy.yaml").read_text())
    lost["task"], lost["dataset_kwargs"] = "lost", {"data_files": str(folder / "lost.jsonl")}
    (folder / "tasks" / "lost.yaml").write_text(yaml.safe_dump(lost))
    endless = yaml.safe_load((tasks / "echo.yaml").read_text())
    endless["task"], endless["generation_kwargs"]["max_gen_toks"] = "endless", float("inf")
    (folder / "tasks" / "endless.yaml").write_text(yaml.safe_dump(endless))
    numbered = yaml.safe_load((tasks / "roll.yaml").read_text())
    numbered["task"], numbered["metric_list"][1]["metric"] = "numbered", 2
    (folder / "tasks" / "numbered.yaml").write_text(yaml.safe_dump(numbered))
    return folder


def task(**changes):
    return {"evaluation.tasks": [{"task": "toy", "dev": 40, "report": 30, **changes}]}


def written(**settings):
    """A task whose answers are generated with these settings."""
    entry = {"task": "free", "metric": "exact_match", "dev": 5, "report": 5}
    return {"evaluation.tasks": [entry], "evaluation.gen_kwargs": settings}


# What is changed ("SPOILT/x" stands for a folder above), and what the sentence has to hold: place and remedy.
TABLE = {
    "unknown key": ({"serch": 1}, ["serch", "did you mean 'search'?"]),
    "misspelt key that is needed": ({"budgets": {}, "budget": DROP}, ["budgets", "did you mean 'budget'?"]),
    "unknown key of a section": ({"pool.num_worker": 2}, ["pool.num_worker", "'num_workers'"]),
    "unknown key of a search": ({"search.generation": 2}, ["search.generation", "'generations'"]),
    "wrong type": ({"seed": "one"}, ["seed", "'one'", "write an integer"]),
    "wrong type in a list": (task(dev="40"), ["evaluation.tasks[0].dev", "'40'", "write"]),
    "number out of range": ({"search.F": 9.0}, ["search.F", "write"]),
    "not a number": ({"search.F": float("nan")}, ["search.F", "nan", "write"]),
    "weight is not a number": (task(weight=float("nan")), ["evaluation.tasks[0].weight", "nan", "write"]),
    "mass is not a number": ({"baselines.masses": [1.0, float("nan")]}, ["baselines.masses", "nan", "write"]),
    "mass is infinite": ({"baselines.masses": [float("inf")]}, ["baselines.masses", "inf", "write"]),
    "memory is not a number": ({"pool.cache_gb": float("nan")}, ["pool.cache_gb", "nan", "write"]),
    "memory is infinite": ({"pool.cache_gb": float("inf")}, ["pool.cache_gb", "inf", "write"]),
    "merger weight is not a number": (
        {"search.merger": {"method": "ties", "lambda": float("nan")}},
        ["search.merger.lambda", "nan", "write"],
    ),
    "fixed setting is not a number": (
        {"search": {"algorithm": "tpe", "method": "ties", "settings": {"density": float("nan")}}},
        ["search.settings.density", "nan", "write"],
    ),
    "missing key": ({"budget": DROP}, ["budget", "missing", "add it"]),
    "missing key of a task": (
        {"evaluation.tasks": [{"task": "toy", "dev": 9}]},
        ["tasks[0].report", "missing", "add it"],
    ),
    "target alone": ({"budget": {"target": 0.9}}, ["budget", "may never be reached", "minutes or patience"]),
    "target that nobody reaches": (
        {"budget": {"candidates": 3, "target": 90}},
        ["budget.target", "above the highest score that there is, 1", "0.9"],
    ),
    "empty section": ({"budget": {}}, ["budget", "give candidates, items, minutes or patience"]),
    "no task": ({"evaluation.tasks": []}, ["evaluation.tasks", "write"]),
    "one expert": ({"experts": {"a": "SPOILT/file"}}, ["experts", "at least two"]),
    "expert called winner": ({"experts.winner": "SPOILT/file"}, ["experts", "'winner'", "use letters"]),
    "expert with the name of a baseline": (
        {"experts.task_arithmetic@1": "SPOILT/file"},
        ["experts", "'task_arithmetic@1'", "use letters"],
    ),
    "expert under a number": ({"experts": {1: "SPOILT/file", 2: "SPOILT/file"}}, ["experts", "write"]),
    "run name with a slash": ({"run": "../other"}, ["run", "'../other'", "write"]),
    "unknown dtype": ({"model.dtype": "int8"}, ["model.dtype", "'int8'", "'bfloat16'"]),
    "missing expert": ({"experts.a": "SPOILT/none"}, ["experts.a", "SPOILT/none", "give the folder"]),
    "missing base": ({"model.base": "SPOILT/none"}, ["model.base", "SPOILT/none", "give the folder"]),
    "hub id without a network": ({"experts.a": "nobody/nothing"}, ["experts.a", "nobody/nothing", "give the folder"]),
    "expert is a file": ({"experts.a": "SPOILT/file"}, ["experts.a", "SPOILT/file", "give the folder"]),
    "not a checkpoint": ({"experts.a": "SPOILT/nothing"}, ["experts.a", "no config.json", "give a Hugging Face"]),
    "no weights": ({"experts.a": "SPOILT/hollow"}, ["experts.a", "holds no model.safetensors", "give"]),
    "truncated weights": ({"experts.a": "SPOILT/truncated"}, ["experts.a", "truncated/model.safetensors", "copy"]),
    "garbled config": ({"experts.a": "SPOILT/garbled"}, ["experts.a", "garbled/config.json", "copy"]),
    "pickle only": ({"experts.a": "SPOILT/pickled"}, ["experts.a", "pytorch_model.bin", "save", "safetensors"]),
    "other architecture": ({"experts.a": "SPOILT/gpt"}, ["experts.a", "gpt2", "only fine-tunes"]),
    "other vocabulary": ({"experts.a": "SPOILT/words"}, ["experts.a", "vocabulary", "give a fine-tune"]),
    "DoRA": ({"experts.a": "SPOILT/dora"}, ["experts.a", "PEFT cannot put", "lora_magnitude_vector", "give the base"]),
    "adapter with LoRA biases": ({"experts.a": "SPOILT/biased"}, ["experts.a", "lora_bias", "train it again"]),
    "a model that finds no room": (
        {"model.base": "SPOILT/many", "experts": {"a": "SPOILT/many", "b": "SPOILT/many"}},
        ["model.base", "SPOILT/many takes 640.0 GiB", "GiB are free", "use a machine with more memory"],
    ),
    "weights that cannot be mapped": (
        {"model.base": "SPOILT/huge"},
        ["model.base", "huge/model-0.safetensors", "cannot be mapped", "smaller shards"],
    ),
    "base is an adapter": (
        {"model.base": "SPOILT/dora"},
        ["model.base", "SPOILT/dora", "give the model that it was trained on"],
    ),
    "base of no type": (
        {"model.base": "SPOILT/of-no-type"},
        ["model.base", "of-no-type/config.json", "model_type None"],
    ),
    "base of an unknown type": (
        {"model.base": "SPOILT/of-an-unknown-type"},
        ["model.base", "of-an-unknown-type/config.json", "'llamma'", "'llama'"],
    ),
    "base with a word as size": (
        {"model.base": "SPOILT/of-words"},
        ["model.base", "of-words/config.json", "hidden_size is '64'", "an integer"],
    ),
    "base that its config.json makes narrower": (
        {"model.base": "SPOILT/narrower"},
        ["model.base", "SPOILT/narrower", "(319, 64)", "(319, 32)"],
    ),
    "base that its config.json makes deeper": (
        {"model.base": "SPOILT/deeper"},
        ["model.base", "SPOILT/deeper", "lacks model.layers.2.", "config.json"],
    ),
    "base of a billion layers": (
        {"model.base": "SPOILT/bottomless"},
        ["model.base", "bottomless/config.json", "num_hidden_layers is 1000000000"],
    ),
    "base of no heads": ({"model.base": "SPOILT/headless"}, ["model.base", "headless/config.json", "mend the file"]),
    "base without the head that it names": ({"model.base": "SPOILT/untied"}, ["model.base", "lacks lm_head.weight"]),
    "base that reads no token": ({"model.base": "SPOILT/unread"}, ["model.base", "SPOILT/unread", "reads 0 tokens"]),
    "base with a value that is no number": (
        {"model.base": "SPOILT/of-no-number"},
        ["model.base", "of-no-number/config.json", "rms_norm_eps is no number"],
    ),
    "no tokenizer": ({"model.base": "SPOILT/mute"}, ["model.base", "SPOILT/mute", "no tokenizer.json", "copy"]),
    "tokenizer settings in a list": (
        {"model.base": "SPOILT/stuttering"},
        ["model.base", "SPOILT/stuttering", "tokenizer_config.json", "copy"],
    ),
    "tokenizer without a vocabulary": (
        {"model.base": "SPOILT/wordless"},
        ["model.base", "wordless/tokenizer.json", "vocabulary", "copy"],
    ),
    "no chat template": ({"evaluation.apply_chat_template": True}, ["evaluation.apply_chat_template", "write false"]),
    "broken chat template": (
        {"evaluation.apply_chat_template": True, "model.base": "SPOILT/unfinished"},
        ["evaluation.apply_chat_template", "cannot be applied", "chat_template.jinja"],
    ),
    "chat template without the question": (
        {"evaluation.apply_chat_template": True, "model.base": "SPOILT/deaf"},
        ["evaluation.apply_chat_template", "leaves out what the user asks"],
    ),
    "answers as long as the model": (written(max_gen_toks=128), ["gen_kwargs.max_gen_toks", "128", "no room", "free"]),
    "answers of no token": (written(max_gen_toks=0), ["evaluation.gen_kwargs.max_gen_toks", "0", "an integer from 1"]),
    "limit that the task hides": (written(max_new_tokens=9), ["gen_kwargs.max_new_tokens", "write max_gen_toks"]),
    "unknown setting of generation": (
        written(temprature=0.5),
        ["evaluation.gen_kwargs.temprature", "did you mean 'temperature'?"],
    ),
    "answers end at a number": (written(until=7), ["evaluation.gen_kwargs.until", "7", "a text or a list of texts"]),
    "share above 1": (written(top_p=7), ["evaluation.gen_kwargs.top_p", "7", "up to 1"]),
    "sampling without a temperature": (written(do_sample=True), ["evaluation.gen_kwargs.do_sample", "temperature"]),
    "settings of generation for a choice": (
        task(gen_kwargs={"max_gen_toks": 3}),
        ["evaluation.tasks[0].gen_kwargs", "generates no answer", "leave the key out"],
    ),
    "unknown search": ({"search.algorithm": "evolve"}, ["search.algorithm", "'evolve'", "'evolver'"]),
    "no search": ({"search": {}}, ["search", "'algorithm'"]),
    "unknown strategy": ({"search.strategy": "rand/3"}, ["search.strategy", "'rand/3'", "'rand/2'"]),
    "too few experts": (
        {"search.strategy": "rand/1"},
        ["search.strategy", "rand/1 needs a population of 4", "population: 4"],
    ),
    "in flight without steady": (
        {"search.in_flight": 3},
        ["search.in_flight", "in mode sequential, the search itself decides", "mode: steady"],
    ),
    "unknown order": ({"order": "exakt"}, ["order", "'exakt'", "'exact' or 'arrival'"]),
    "a share of no worker": ({"pool.share": 0}, ["pool.share", "0", "write"]),
    "unknown merger": ({"search.merger": {"method": "tie"}}, ["search.merger.method", "'tie'", "'ties'"]),
    "merger without method name": ({"search.merger": {"method": 3}}, ["search.merger.method", "3", "known"]),
    "unknown merger setting": (
        {"search.merger": {"method": "ties", "densiti": 0.5}},
        ["search.merger", "'densiti'", "'density'"],
    ),
    "bad merger setting": (
        {"search.merger": {"method": "ties", "density": 1.5}},
        ["search.merger.density", "1.5", "write a number"],
    ),
    "merger weights of other length": (
        {"search.merger": {"method": "linear", "weight": [0.5, 0.5]}},
        ["search.merger.weight", "2 numbers for 3 experts", "write one"],
    ),
    "unknown merge method": ({"search": {"algorithm": "tpe", "method": "tiess"}}, ["search.method", "'ties'"]),
    "method without settings": ({"search": {"algorithm": "tpe", "method": "simple"}}, ["search.method", "choose"]),
    "nothing to tune": ({"search": {"algorithm": "tpe", "tune": ["density"]}}, ["search.tune", "'density'", "known"]),
    "several objectives of one task": ({"search": {"algorithm": "nsga2"}}, ["search.algorithm", "choose tpe"]),
    "empty tune": ({"search": {"algorithm": "tpe", "tune": []}}, ["search.tune", "write"]),
    "too many layer groups": ({"search": {"algorithm": "cmaes", "layer_groups": 9}}, ["search.layer_groups", "write"]),
    "unknown task": (task(task="toyy"), ["evaluation.tasks[0].task", "'toyy'", "'toy'"]),
    "task twice": (
        {"evaluation.tasks": [{"task": "toy", "dev": 4, "report": 4}] * 2},
        ["evaluation", "'toy'", "is listed twice", "list it once"],
    ),
    "unknown metric": (task(metric="accc"), ["evaluation.tasks[0].metric", "'accc'", "'acc'"]),
    "unknown filter": (task(metric="acc,frist"), ["evaluation.tasks[0].metric", "'frist'", "none"]),
    "no documents": (task(task="empty"), ["evaluation.tasks", "'empty'", "check its data files"]),
    "no data file": (
        {**task(task="lost"), "evaluation.include_path": "SPOILT/tasks"},
        ["evaluation.tasks", "lost.jsonl", "check its data files"],
    ),
    "a task whose answers have no number of tokens": (
        {**task(task="endless", metric="exact_match"), "evaluation.include_path": "SPOILT/tasks"},
        ["evaluation.tasks[0].task", "endless has the max_gen_toks inf", "write a number of tokens"],
    ),
    "a task whose metric is a number": (
        {**task(task="numbered", metric="bits_per_byte"), "evaluation.include_path": "SPOILT/tasks"},
        ["evaluation.tasks[0].metric", "numbered has no metric 'bits_per_byte'", "known: 2, word_perplexity"],
    ),
    "more items than there are": (
        task(dev=100, report=100),
        ["tasks[0].dev + report", "110 different", "ask for fewer"],
    ),
    "report items that were seen": (
        task(report_task="toy", report=90),
        ["evaluation.tasks[0]", "are both dev items and report items", "share no item"],
    ),
    "include_path is no folder": ({"evaluation.include_path": "SPOILT/none"}, ["evaluation.include_path", "give"]),
    "include_path is a file": ({"evaluation.include_path": "SPOILT/file"}, ["evaluation.include_path", "give"]),
    "unknown logger": ({"loggers": {"mlfow": {}}}, ["loggers.mlfow", "unknown logger", "did you mean 'mlflow'?"]),
    "unknown key of a logger": ({"loggers": {"mlflow": {"url": "x"}}}, ["loggers.mlflow.url", "did you mean 'uri'?"]),
    "list of loggers": ({"loggers": ["mlflow"]}, ["loggers", "['mlflow']", "write"]),
    "unknown mode of a logger": ({"loggers": {"wandb": {"mode": "on"}}}, ["loggers.wandb.mode", "'on'", "'online' or"]),
    "events on an object store": (
        {"loggers": {"tensorboard": {"folder": "s3://bucket/events"}}},
        ["loggers.tensorboard.folder", "s3://bucket/events is not on this machine", "give a folder that is"],
    ),
    "language model as classifier": (
        {"model.kind": "classifier"},
        ["evaluation.tasks[0].data", "missing", "give the file or the data set of toy"],
    ),
}


def call(file, results, capsys):
    capsys.readouterr()
    began = time.process_time()
    code = run_job([str(file), "--results", str(results)])
    assert time.process_time() - began < SECONDS * toys.slowness()
    return code, capsys.readouterr().err


def assert_one_sentence(code, err, words):
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("name", TABLE)
def test_says_what_is_wrong_and_what_to_write(name, make_config, spoilt, tmp_path, capsys):
    changes, words = TABLE[name]
    file = make_config(tmp_path, changes)
    file.write_text(file.read_text().replace("SPOILT", str(spoilt)))
    code, err = call(file, tmp_path / "results", capsys)
    assert_one_sentence(code, err, [str(file), *(w.replace("SPOILT", str(spoilt)) for w in words)])
    assert not (tmp_path / "results").exists()


BROKEN = {
    "no such file": (None, ["cannot be read", "give the path"]),
    "not YAML": ("run: [toy", ["not valid YAML", "line 1", "correct it"]),
    "key twice": ("run: toy\nseed: 1\nseed: 2\n", ["'seed' appears twice", "line 1", "correct it"]),
    "a list": ("- run\n", ["must be a mapping", "run"]),
    "empty": ("", ["must be a mapping"]),
    "unhashable key": ("? [run]\n: toy\n", ["not valid YAML", "correct it"]),
    "number as key": ("1: toy\n", ["run", "missing", "add it"]),
    "a date": ("run: 2024-01-01\n", ["run", "write"]),
    "not text": (b"\xff\xfe\x00", ["cannot be read", "give the path"]),
    "control character": ("run: \x00\n", ["not valid YAML", "correct it"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_configuration(name, tmp_path, capsys):
    text, words = BROKEN[name]
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, err = call(file, tmp_path / "results", capsys)
    assert_one_sentence(code, err, [str(file), *words])
    assert not (tmp_path / "results").exists()


@pytest.mark.whole
def test_folder_of_another_run(make_config, tmp_path, capsys):
    toys.run_here(make_config(tmp_path, {"budget.candidates": 1}), tmp_path / "results")
    code, err = call(make_config(tmp_path, {"search.Cr": 0.25}), tmp_path / "results", capsys)
    assert_one_sentence(code, err, [str(tmp_path / "results" / "toy"), "search.Cr: 0.5 → 0.25", "another run name"])


def test_folder_that_is_no_run(make_config, tmp_path, capsys):
    (tmp_path / "results" / "toy").mkdir(parents=True)
    (tmp_path / "results" / "toy" / "thesis.txt").write_text("mine")
    code, err = call(make_config(tmp_path), tmp_path / "results", capsys)
    assert_one_sentence(code, err, [str(tmp_path / "results" / "toy"), "choose another run name"])
    assert [p.name for p in (tmp_path / "results" / "toy").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("place", ["results", "results/toy"])
def test_a_file_stands_where_the_folder_should(make_config, tmp_path, capsys, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    code, err = call(make_config(tmp_path), tmp_path / "results", capsys)
    assert_one_sentence(code, err, [str(tmp_path / "results" / "toy"), "choose"])
    assert (tmp_path / place).read_text() == "a file"


@pytest.fixture
def disk(tmp_path):
    """``disk(options)``: a file system of its own, mounted with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if made.returncode:
            pytest.skip("file systems can only be mounted by root")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [("ro", ["Read-only file system", "correct the permissions"]), ("size=4k", ["No space left on device"])],
)
def test_a_results_folder_that_takes_nothing(make_config, disk, tmp_path, capsys, options, words):
    folder = disk(options)
    code, err = call(make_config(tmp_path), folder, capsys)
    assert_one_sentence(code, err, [str(folder), *words])


def test_garbled_identity_of_a_run(make_config, tmp_path, capsys):
    folder = tmp_path / "results" / "toy"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text("{")
    code, err = call(make_config(tmp_path), tmp_path / "results", capsys)
    assert_one_sentence(code, err, [str(folder), "choose another run name"])


def test_no_candidate_can_be_scored(make_config, models, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for name in ("a", "b", "c"):
        shutil.copytree(models / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"].fill_(3e38)  # finite, so that it is opened; what it computes is not
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    file = make_config(tmp_path, {f"experts.{n}": str(tmp_path / n) for n in ("a", "b", "c")})
    code, err = call(file, tmp_path / "results", capsys)
    assert_one_sentence(code, err, ["no candidate could be scored", "not finite"])


def test_an_expert_with_values_that_are_no_numbers(make_config, models, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    code, err = call(make_config(tmp_path, {"experts.a": str(tmp_path / "a")}), tmp_path / "results", capsys)
    assert_one_sentence(code, err, ["experts.a", "model.norm.weight", "NaN or infinite"])


@pytest.mark.whole
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search.algorithm": "evolvr"}, ["search.algorithm", "'evolver'"]),
        ({"experts.a": "/nowhere/at/all"}, ["experts.a", "/nowhere/at/all", "give the folder"]),
    ],
)
def test_as_a_process(make_config, tmp_path, changes, words):
    file = make_config(tmp_path, changes)
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = toys.run_process(file, tmp_path / "results")
    assert_one_sentence(ended.code, ended.err, [str(file), *words])
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spent.ru_utime + spent.ru_stime - began.ru_utime - began.ru_stime < SECONDS * toys.slowness()
    assert ended.out == ""
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mute", {}, "has no tokenizer that can be read (there is no tokenizer.json)"),
        ("unfinished", {"evaluation.apply_chat_template": True}, "cannot be applied"),
        ("deaf", {"evaluation.apply_chat_template": True}, "leaves out what the user asks"),
    ],
)
def test_models_are_checked_before_one_of_them_is_loaded(
    make_config, models, spoilt, tmp_path, monkeypatch, name, changes, says
):
    monkeypatch.setattr("evolver.commands.evaluate.build_model", lambda *_: pytest.fail("a model is loaded"))
    talking = shutil.copytree(models / "base", tmp_path / "talking")
    (talking / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    file, model = make_config(tmp_path, {"model.base": str(talking), **changes}), str(spoilt / name)
    with pytest.raises(BadInput) as caught:
        score_models(str(file), [str(talking), model], "dev")
    assert str(caught.value).startswith(f"{file}: evolver evaluate {model}: ")
    assert says in str(caught.value)


EARLY = {
    "unknown key": {"sead": 1},
    "unknown search": {"search.algorithm": "evolvr"},
    "unknown setting of a search": {"search.generatons": 8},
    "unknown logger": {"loggers": {"mlfow": {}}},
    "no base": {"model.base": "/nowhere/base"},
    "no expert": {"experts.a": "/nowhere/a"},
}
HEAVY = """
import sys
from {module} import {name}
sys.argv = ["", *{arguments!r}]
try:
    code = {name}()
except SystemExit as end:
    code = end.code
print(code, [m for m in ("torch", "transformers", "lm_eval", "ray") if m in sys.modules])
"""


@pytest.mark.whole
@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize(
    ("module", "call", "words"),
    [("cluster.command", "run_job", []), ("evolver.commands.cli", "main", ["validate"])],
    ids=["run", "validate"],
)
def test_what_needs_no_torch_is_refused_before_it_is_imported(make_config, tmp_path, name, module, call, words):
    file = make_config(tmp_path, EARLY[name])
    code = HEAVY.format(module=module, name=call, arguments=[*words, str(file)])
    done = subprocess.run([sys.executable, "-c", code], cwd=toys.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert_one_sentence(2, done.stderr, [str(file), "nowhere" if name.startswith("no ") else "did you mean"])
