"""Classification heads kept apart, and heads over the union of labels."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file
from test_lora import train
from toys import rows, run_here, texts
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
)

from evolver.config.reading import config_at
from evolver.driver.prepare import in_compute, prepare
from evolver.driver.run import _baselines
from evolver.errors import BadInput
from evolver.records import Candidate
from evolver.records.recipe import Merge
from evolver.workers.worker import Worker

SPACES = {"mood": ("bad", "fair", "good"), "colour": ("red", "good")}


def classifier(labels, body, seed):
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=len(toys.tokenizer()), max_position_embeddings=toys.LENGTH, initializer_range=0.3, pad_token_id=2,
        id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    if body is not None:
        noisy = {k: v + 0.1 * torch.randn_like(v) for k, v in body.items() if not k.startswith("classifier")}
        model.load_state_dict(noisy, strict=False)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny BERT with an arbitrary head, and two fine-tunes with heads of different numbers of labels."""
    folder, words = tmp_path_factory.mktemp("heads"), toys.tokenizer()
    base = classifier(("x", "y"), None, 0)
    models = {"base": base} | {n: classifier(s, base.state_dict(), i) for i, (n, s) in enumerate(SPACES.items(), 1)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


@pytest.fixture
def configured(folders, tmp_path):
    """``configured(heads, **changes of every task)`` writes data and a configuration."""

    def make(heads, **changes):
        entries = []
        for task, labels in SPACES.items():
            draw, file = random.Random(task), tmp_path / f"{task}.jsonl"
            file.write_text("".join(json.dumps({"text": t, "label": draw.choice(labels)}) + "\n" for t in texts(150)))
            entries.append({"task": task, "data": str(file), "dev": 40, "report": 30, **changes})
        settings = {
            "run": "heads",
            "model": {"base": str(folders / "base"), "kind": "classifier", "heads": heads},
            "experts": {n: str(folders / n) for n in SPACES},
            "search": {"algorithm": "evolver", "generations": 3},
            "budget": {"candidates": 8},
            "evaluation": {"tasks": entries, "batch_tokens": 128},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return tmp_path / "run.yaml"

    return make


def plain_answers(model, words, items, labels):
    out = []
    for _, row in items:
        with torch.inference_mode():
            logits = model(torch.tensor([words(row["text"])["input_ids"]])).logits[0]
        out.append(float(labels[int(logits.argmax())] == row["label"]))
    return out


@pytest.mark.whole
def test_each_task_is_scored_with_its_own_head(configured, folders, tmp_path):
    file = configured("apart")
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 80, "equal": 80}
    items = prepare(config_at(file)).tasks.items.dev
    data = {t: [json.loads(line) for line in (tmp_path / f"{t}.jsonl").read_text().splitlines()] for t in SPACES}
    found = next(r for r in rows(folder).values() if r["recipe"] == toys.winner(folder) and r["stage"] != "report")
    for task, labels in SPACES.items():
        best = AutoModelForSequenceClassification.from_pretrained(folder / "best" / task).eval()
        words = AutoTokenizer.from_pretrained(folder / "best" / task)
        own = [(i, data[task][i.index]) for i in items if i.task.startswith(f"{task}:")]
        said = [a for i, a in zip(items, found["items"], strict=True) if i.task.startswith(f"{task}:")]
        assert said == plain_answers(best, words, own, labels)
        assert 0 < sum(said) < len(said)
        assert best.config.num_labels == len(labels)
        expert = AutoModelForSequenceClassification.from_pretrained(folders / task)
        assert torch.equal(best.classifier.weight, expert.classifier.weight)
        assert not torch.equal(
            best.bert.encoder.layer[0].output.dense.weight, expert.bert.encoder.layer[0].output.dense.weight
        )


@pytest.mark.whole
def test_a_head_can_be_borrowed(configured, tmp_path):
    file = configured("apart", head="colour", label="label")
    raw = yaml.safe_load(file.read_text())
    raw["evaluation"]["tasks"] = raw["evaluation"]["tasks"][1:]
    raw["evaluation"]["tasks"][0]["task"] = "other"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    assert (run_here(file, tmp_path / "results") / "best" / "colour" / "config.json").is_file()


def test_a_head_of_nobody_is_refused(configured):
    file = configured("apart", head="colur")
    with pytest.raises(
        BadInput, match=r"evaluation.tasks\[0\].head: there is no expert 'colur'; did you mean 'colour'"
    ):
        prepare(config_at(file))


def test_heads_belong_to_the_identity_of_a_run(configured, folders, tmp_path):
    ready = prepare(config_at(configured("apart")))
    assert set(ready.identity["heads"]) == {"head of mood", "head of colour"}
    assert "classifier.weight" not in ready.opened.base.names()


def test_different_heads_cannot_be_merged_as_they_stand(configured):
    with pytest.raises(BadInput, match=r"experts.mood: classifier.* has shape"):
        prepare(config_at(configured("merged")))


def test_a_union_has_all_labels_and_averages_over_those_who_know_them(configured, folders):
    ready = prepare(config_at(configured("union")))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    average = Merge("simple", ready.experts, ready.base)
    merged = dict(worker.materialiser.stream(average))
    mood, colour = (
        AutoModelForSequenceClassification.from_pretrained(folders / n).classifier.weight.detach() for n in SPACES
    )
    head = merged["classifier.weight"]
    assert ready.opened.labels == ("bad", "fair", "good", "red")
    torch.testing.assert_close(head[:2], mood[:2])
    torch.testing.assert_close(head[2], (mood[2] + colour[1]) / 2)
    torch.testing.assert_close(head[3], colour[0])


@pytest.mark.whole
def test_a_whole_run_over_the_union_of_labels(configured, tmp_path):
    file = configured("union")
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 80, "equal": 80}
    best = AutoModelForSequenceClassification.from_pretrained(folder / "best").eval()
    assert best.config.label2id == {"bad": 0, "fair": 1, "good": 2, "red": 3}
    words, labels = AutoTokenizer.from_pretrained(folder / "best"), list(best.config.label2id)
    items = prepare(config_at(file)).tasks.items.dev
    data = {t: [json.loads(line) for line in (tmp_path / f"{t}.jsonl").read_text().splitlines()] for t in SPACES}
    found = next(r for r in rows(folder).values() if r["recipe"] == toys.winner(folder) and r["stage"] != "report")
    pairs = [(i, data[i.task.partition(":")[0]][i.index]) for i in items]
    assert found["items"] == plain_answers(best, words, pairs, labels)


@pytest.mark.parametrize(("heads", "layers"), [("apart", 2 * 6 + 1), ("union", 2 * 6 + 2)])
def test_statistics_are_those_of_the_layers_that_are_merged(configured, heads, layers):
    """Six linear layers in each of two, the pooler, and the head where all share one; each expert on its own task."""
    file = configured(heads)
    raw = yaml.safe_load(file.read_text()) | {"search": {"algorithm": "tpe", "method": "regmean"}}
    file.write_text(yaml.safe_dump(raw))
    ready = in_compute(prepare(config_at(file)), "float32")
    worker, recipe = Worker(ready.plan, "dev", tasks=ready.tasks), ready.search.space.decode({"a": 0.9, "ridge": 1e-6})
    result = worker.evaluate(Candidate(0, recipe, "test"))
    assert result.status == "ok", result.reason
    assert len({s.items for s in recipe.statistics}) == 2
    for node in recipe.statistics:
        found = [worker.materialiser._statistics[node.id].get(n) for n in ready.opened.base.names()]
        assert sum(gram is not None for gram in found) == layers


def published(folders, kind, target):
    """The base's body as encoders are published: bare, with heads of pretraining, or with the names of old files."""
    source = BertForSequenceClassification.from_pretrained(folders / "base")
    if kind == "bare":
        source.bert.save_pretrained(target)
    else:
        made = {"pretraining": BertForPreTraining, "old": BertForPreTraining, "masked": BertForMaskedLM}[kind]
        model = made(BertConfig.from_pretrained(folders / "base"))
        model.bert.load_state_dict(source.bert.state_dict(), strict=False)
        model.save_pretrained(target)
    if kind == "old":
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {"bert.embeddings.position_ids": torch.arange(toys.LENGTH)[None]}
        for name, tensor in load_file(target / "model.safetensors").items():
            new = next((n for n in names if name.endswith(n)), "")
            tensors[name.removesuffix(new) + names.get(new, "")] = tensor.clone()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    toys.tokenizer().save_pretrained(target)
    return target


def average_on(file):
    """The names that are merged, and the answers of the average of the experts' bodies."""
    ready = in_compute(prepare(config_at(file)), "float32")
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result = worker.evaluate(Candidate(0, Merge("simple", ready.experts, ready.base), "test"))
    assert result.status == "ok", result.reason
    return ready.opened, result.items


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["bare", "pretraining", "old", "masked"])
def test_classifiers_merge_on_a_published_encoder(configured, folders, tmp_path, kind):
    """As on a base that was saved as a classifier; a pooler that only the experts have stays with their heads."""
    plain, _ = average_on(configured("apart"))
    file = configured("apart")
    raw = yaml.safe_load(file.read_text())
    raw["model"]["base"] = str(published(folders, kind, tmp_path / kind))
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    found, items = average_on(file)
    poolers = {n for n in plain.base.names() if "pooler" in n} if kind == "masked" else set()
    assert set(found.base.names()) == set(plain.base.names()) - poolers
    assert all(poolers <= head.keys() and "classifier.weight" in head for head in found.heads.values())
    assert any("has no place for" in w for w in found.warnings) == (kind != "bare"), found.warnings
    models = {n: AutoModelForSequenceClassification.from_pretrained(folders / n) for n in SPACES}
    body = {n: sum(m.state_dict()[n] for m in models.values()) / 2 for n in found.base.names()}
    tasks, right = prepare(config_at(file)).tasks.items.dev, []
    for task, model in models.items():
        model.load_state_dict(body, strict=False)
        own = [i for i in tasks if i.task.startswith(f"{task}:")]
        data = [json.loads(line) for line in (tmp_path / f"{task}.jsonl").read_text().splitlines()]
        right += plain_answers(
            model.eval(), toys.tokenizer(), [(i, data[i.index]) for i in own], SPACES[task]
        )  # fmt: skip
    by_task = [a for task in SPACES for i, a in zip(tasks, items, strict=True) if i.task.startswith(f"{task}:")]
    assert by_task == right
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 80, "equal": 80}
    for task in SPACES:
        _, info = AutoModelForSequenceClassification.from_pretrained(
            folder / "best" / task, output_loading_info=True
        )  # fmt: skip
        assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())


@pytest.mark.whole
def test_a_base_without_a_head_needs_heads_of_their_own(configured, folders, tmp_path):
    file = configured("merged")
    raw = yaml.safe_load(file.read_text())
    raw["model"]["base"] = str(published(folders, "bare", tmp_path / "bare"))
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    said = r"experts.mood: .*/mood has a classification head .* and the base .*/bare has none .*heads: apart or union"
    with pytest.raises(BadInput, match=said):
        prepare(config_at(file))


def named_answers(folder, file, tasks):
    """Whether a classifier, whatever its labels, names the right one, over all items."""
    model, words, out = AutoModelForSequenceClassification.from_pretrained(folder).eval(), toys.tokenizer(), []
    for item in tasks:
        row = json.loads((file.parent / f"{item.task.partition(':')[0]}.jsonl").read_text().splitlines()[item.index])
        out += plain_answers(model, words, [(item, row)], list(model.config.id2label.values()))
    return out


def test_experts_of_a_union_are_shown_as_they_are(configured, folders):
    """With their own labels; what is merged has those of all, and so have candidates."""
    file = configured("union")
    ready = in_compute(prepare(config_at(file)), "float32")
    worker, dev = Worker(ready.plan, "dev", tasks=ready.tasks), ready.tasks.items.dev
    shown, differ = dict(_baselines(ready)), []
    for expert in ready.experts:
        own = named_answers(folders / expert.name, file, dev)
        assert 0 < sum(own) < len(own)
        assert worker.evaluate(Candidate(0, shown[expert.name], "baseline")).items == tuple(own)
        differ.append(worker.evaluate(Candidate(1, expert, "search")).items != tuple(own))
    assert any(differ)
    assert shown["average"].inputs == ready.experts


@pytest.mark.whole
def test_evaluate_knows_labels_by_their_names(configured, folders):
    file = configured("union")
    dev = prepare(config_at(file)).tasks.items.dev
    for name in SPACES:
        own = named_answers(folders / name, file, dev)
        ended = toys.evolver("evaluate", file, folders / name, "--dev")
        assert ended.code == 0, ended.err
        row = next(line for line in ended.out.splitlines() if line.startswith(f"| {folders / name} "))
        assert f" {100 * sum(own) / len(own):.1f} " in row


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["bare", "masked"])
def test_a_union_on_a_published_encoder(configured, folders, tmp_path, kind):
    """A pooler that only the experts have is merged as a part of their heads."""
    file = configured("union")
    raw = yaml.safe_load(file.read_text())
    raw["model"]["base"] = str(published(folders, kind, tmp_path / kind))
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    ready = prepare(config_at(file))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    merged = dict(worker.materialiser.stream(Merge("simple", ready.experts, ready.base)))
    poolers = [load_file(folders / n / "model.safetensors")["bert.pooler.dense.weight"] for n in SPACES]
    torch.testing.assert_close(merged["bert.pooler.dense.weight"], sum(poolers) / 2)
    for name, expert in zip(SPACES, ready.experts, strict=True):
        alone = dict(worker.materialiser.stream(expert))
        assert torch.equal(alone["bert.pooler.dense.weight"], poolers[list(SPACES).index(name)])
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 80, "equal": 80}
    best, info = AutoModelForSequenceClassification.from_pretrained(folder / "best", output_loading_info=True)
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
    assert best.config.label2id == {"bad": 0, "fair": 1, "good": 2, "red": 3}


@pytest.fixture
def marked(folders, tmp_path):
    """The models, of which one has a token more than the others, with a row of its own."""
    for name in ("base", *SPACES):
        model, words = AutoModelForSequenceClassification.from_pretrained(folders / name), toys.tokenizer()
        if name == "mood":
            words.add_tokens(["<mark>"])
            model.resize_token_embeddings(len(words))
            torch.manual_seed(8)
            model.bert.embeddings.word_embeddings.weight.data[-1] = torch.randn(32)
        for part in (model, words):
            part.save_pretrained(tmp_path / "marked" / name)
    return tmp_path / "marked"


@pytest.mark.whole
@pytest.mark.parametrize("heads", ["merged", "apart", "union"])
def test_classifiers_may_have_tokens_of_their_own(configured, marked, tmp_path, heads):
    file = configured("union" if heads == "union" else "apart")
    raw = yaml.safe_load(file.read_text())
    for task in raw["evaluation"]["tasks"]:
        rows_of = [json.loads(line) for line in (tmp_path / f"{task['task']}.jsonl").read_text().splitlines()]
        toys.write_rows(tmp_path / f"{task['task']}.jsonl", [{**r, "text": f"<mark> {r['text']}"} for r in rows_of])
    raw["model"] |= {"base": str(marked / "base"), "heads": heads}
    raw["experts"] = {n: str(marked / n) for n in SPACES}
    raw["search"] = {"algorithm": "tpe"}
    if heads == "merged":
        raw["experts"] = {"mood": str(marked / "mood"), "again": str(marked / "mood")}
        raw["model"]["base"] = str(folder_of_moods(marked, tmp_path / "moods"))
        raw["evaluation"]["tasks"] = raw["evaluation"]["tasks"][:1]
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    ready = in_compute(prepare(config_at(file)), "float32")
    assert any("the models have different tokens" in w for w in ready.warnings)
    count = len(ready.tasks.items.dev)
    worker, shown = Worker(ready.plan, "dev", tasks=ready.tasks), dict(_baselines(ready))
    mood = [(i, json.loads((tmp_path / "mood.jsonl").read_text().splitlines()[i.index])) for i in ready.tasks.items.dev
            if i.task.startswith("mood:")]  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(marked / "mood").eval()
    own = plain_answers(model, AutoTokenizer.from_pretrained(marked / "mood"), mood, SPACES["mood"])
    found = worker.evaluate(Candidate(0, shown["mood"], "baseline"))
    assert found.status == "ok", found.reason
    assert [a for a, i in zip(found.items, ready.tasks.items.dev, strict=True) if i.task.startswith("mood:")] == own
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": count, "equal": count}
    best = folder / "best" / ("mood" if heads == "apart" else ".")
    model, info = AutoModelForSequenceClassification.from_pretrained(best, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = AutoTokenizer.from_pretrained(best)
    assert model.config.vocab_size == len(words) == len(toys.tokenizer()) + 1
    assert words.tokenize("<mark> red")[0] == "<mark>"


def folder_of_moods(marked, target):
    """A base without the token, with the head of three moods."""
    model = AutoModelForSequenceClassification.from_pretrained(marked / "mood")
    model.resize_token_embeddings(len(toys.tokenizer()))
    for part in (model, toys.tokenizer()):
        part.save_pretrained(target)
    return target


def test_labels_in_another_order_are_warned_of(configured, folders, tmp_path):
    """Where heads are merged as they stand; a union matches the rows by label."""
    for name in ("one", "other"):
        shutil.copytree(folders / "mood", tmp_path / name)
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    settings |= {"id2label": {"0": "good", "1": "fair", "2": "bad"}, "label2id": {"good": 0, "fair": 1, "bad": 2}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    warned = {}
    for heads in ("merged", "union"):
        file = configured(heads)
        raw = yaml.safe_load(file.read_text())
        raw["model"]["base"] = str(folders / "mood")
        raw["experts"] = {n: str(tmp_path / n) for n in ("one", "other")}
        raw["evaluation"]["tasks"] = raw["evaluation"]["tasks"][:1]
        file.write_text(yaml.safe_dump(raw))
        warned[heads] = [w for w in prepare(config_at(file)).warnings if "in another order" in w]
    assert warned["union"] == []
    (said,) = warned["merged"]
    assert said.startswith("experts.other (")
    assert "'good' is number 0 there and number 2 in the base" in said


def test_a_language_model_has_no_heads(configured):
    file = configured("apart")
    raw = yaml.safe_load(file.read_text())
    raw["model"]["kind"] = "causal-lm"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(BadInput, match="a model of kind causal-lm has no classification heads; write merged"):
        prepare(config_at(file))


@pytest.mark.whole
@pytest.mark.parametrize("place", ["an expert", "the base and an expert"])
@pytest.mark.parametrize("saved", [[], ["classifier"]])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("heads", ["apart", "union"])
def test_a_classifier_with_an_adapter_is_what_peft_makes_of_it(
    configured, folders, marked, tmp_path, heads, tokens, saved, place
):
    """Its head is its own, or that of the model that the adapter is on, and so are its labels and its tokens."""
    own, scores = marked if tokens else folders, {}
    for name in ("mood", "base"):
        model = AutoModelForSequenceClassification.from_pretrained(own / name)
        settings = {"target_modules": ["query", "output.dense"], "modules_to_save": saved or None}
        tuned = train(tmp_path / name, model, seed=len(name), **settings)
        words = AutoTokenizer.from_pretrained(own / name)
        merged = tuned.merge_and_unload()
        for part in (merged, words):
            part.save_pretrained(tmp_path / f"{name}-merged")
    placed = {n: {"plus": f"{own / n}+{tmp_path / n / 'lora'}", "merged": str(tmp_path / f"{n}-merged")} for n in ("mood", "base")}  # fmt: skip  # noqa: E501
    for kind in ("plus", "merged"):
        raw = yaml.safe_load(configured(heads).read_text())
        raw["model"]["base"] = str(own / "base") if place == "an expert" else placed["base"][kind]
        raw["experts"] = {"mood": placed["mood"][kind], "colour": str(own / "colour")}
        raw["budget"]["candidates"] = 3
        raw["search"] = {"algorithm": "tpe"}
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        folder = run_here(tmp_path / f"{kind}.yaml", tmp_path / kind)
        agreed = json.loads((folder / "best.json").read_text())
        assert agreed["equal"] == agreed["items"] == 80
        scores[kind] = sorted((r["stage"], r["number"], r["score"]) for r in toys.all_rows(folder, "finished"))
        for name in ("mood", "colour") if heads == "apart" else (".",):
            model, said = AutoModelForSequenceClassification.from_pretrained(
                folder / "best" / name, output_loading_info=True
            )
            assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            scores[kind].append(model.config.id2label)
    assert scores["plus"] == scores["merged"]


def test_a_head_with_other_rows_than_the_model_below_has_labels_is_refused(configured, folders, tmp_path):
    bodies = AutoModelForSequenceClassification.from_pretrained(folders / "mood").state_dict()
    model = classifier(("a", "b", "c", "d"), bodies, 4)
    train(tmp_path / "mood", model, target_modules=["query"], modules_to_save=["classifier"])
    for heads in ("apart", "union"):
        raw = yaml.safe_load(configured(heads).read_text())
        raw["experts"]["mood"] = f"{folders / 'mood'}+{tmp_path / 'mood' / 'lora'}"
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        with pytest.raises(BadInput, match=r"experts.mood: .* has 4 rows, and config.json of .* names 3 labels"):
            prepare(config_at(tmp_path / "run.yaml"))
