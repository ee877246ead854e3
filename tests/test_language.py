"""Our per-item scores are lm-eval's, whatever way they are computed."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.command import run_job
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.data import read_rows
from evolver.evaluation.items import item_hash
from evolver.evaluation.language import library
from evolver.evaluation.language.decoder import DecoderOnly
from evolver.evaluation.language.loglikelihood import Group, LogLikelihoods
from evolver.merging.export import export
from evolver.records import Candidate
from evolver.records.recipe import Cross, Merge, Rule
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

METRICS = {
    "toy": "acc", "pair": "acc_norm", "echo": "exact_match", "last": "acc", "long": "acc", "free": "exact_match",
    "mutual": "acc_mutual_info", "shots": "acc",
}  # fmt: skip
# Metrics that look at all answers: which of lm-eval's pair is kept of an item.
TOGETHER = {"roll": ("word_perplexity", 0), "yesno": ("mcc", 1)}
DEV = {
    "toy": 60, "pair": 40, "echo": 30, "last": 30, "long": 8, "free": 30, "mutual": 40, "shots": 100, "roll": 8,
    "yesno": 60,
}  # fmt: skip
ALL = METRICS | {task: metric for task, (metric, _) in TOGETHER.items()}


def entries(names):
    return [{"task": n, "metric": ALL[n], "dev": DEV[n], "report": 4} for n in names]


@pytest.fixture(scope="module")
def prepared(make_config, tmp_path_factory):
    return prepare(config_at(make_config(tmp_path_factory.mktemp("language"), {"evaluation.tasks": entries(ALL)})))


@pytest.fixture(scope="module")
def worker(prepared):
    return Worker(prepared.plan, "dev", tasks=prepared.tasks)


@pytest.fixture(scope="module")
def recipe(prepared):
    """Task arithmetic of a crossover and two experts: near to the average, so that the toys are partly solved."""
    a, b, c = prepared.experts
    child = Cross(a, (b,), "evolver", 0.3, 0.5, seed=5)
    rule = Rule.of({"weight": (0.4, 0.3, 0.3), "lambda": 1.0, "normalize": False})
    return Merge("task_arithmetic", (child, b, c), prepared.base, (rule,))


@pytest.fixture(scope="module")
def exported(worker, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(recipe, worker.materialiser, folder, {})
    return folder


@pytest.fixture(scope="module")
def judged(prepared, exported, tasks):
    """What lm-eval says of every dev item, by (task, index)."""
    module = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    lm = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(exported), batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    indices = {task: sorted(i.index for i in prepared.tasks.items.dev if i.task == task) for task in ALL}
    out = simple_evaluate(
        lm, tasks=list(ALL), task_manager=manager, samples=indices, bootstrap_iters=0, fewshot_random_seed=1
    )
    place = {(i.task, i.hash): i.index for i in prepared.tasks.items.dev}
    found = {(n, place[n, item_hash(s["doc"])]): s for n, samples in out["samples"].items() for s in samples}
    assert len(found) == len(place)
    return found


@pytest.fixture(scope="module")
def written(worker, recipe):
    """The worker with the recipe's weights in its live model."""
    worker.live.write(worker.materialiser.stream(recipe))
    return worker


@pytest.fixture(scope="module")
def scores(prepared, written):
    items = prepared.tasks.items.dev
    return dict(zip(items, written.scorer.score(0, len(items)).items, strict=True))


@pytest.mark.parametrize("task", METRICS)
def test_scores_are_those_of_lm_eval(scores, judged, task):
    ours = {i.index: v for i, v in scores.items() if i.task == task}
    assert len(ours) == DEV[task]
    assert ours == {index: judged[task, index][METRICS[task]] for index in ours}
    assert 0 < sum(ours.values()) < len(ours)  # neither all right nor all wrong: the comparison says something


@pytest.mark.parametrize("task", TOGETHER)
def test_answers_of_metrics_that_look_at_all_of_them_are_those_of_lm_eval(scores, judged, task):
    metric, part = TOGETHER[task]
    ours = {i.index: v for i, v in scores.items() if i.task == task}
    theirs = [judged[task, index][metric][part] for index in ours]
    assert list(ours.values()) == pytest.approx(theirs, rel=1e-5)
    assert len(set(ours.values())) > 1


def test_metrics_are_those_of_lm_eval_on_the_same_items(prepared, scores, judged):
    """Per task, by lm-eval's own aggregation over its own answers."""
    scale = prepared.tasks.scale("dev")
    found = scale.of_tasks(list(scores.values()))
    library = prepared.tasks.judges["toy"].library
    for task, metric in ALL.items():
        values = [judged[task, i.index][metric] for i in scores if i.task == task]
        theirs = library.tasks[task].aggregation()[metric](values)
        assert found[task] == pytest.approx(-theirs if scale.metrics[task].negative else theirs, rel=1e-5)


def test_items_are_aligned_by_their_content(scores, judged):
    assert all(item.hash == item_hash(judged[item.task, item.index]["doc"]) for item in scores)


def language(scorer):
    (part, _), *others = scorer.parts
    assert not others
    return part


@pytest.fixture(scope="module")
def groups(written):
    return language(written.scorer).groups


def forward(worker, groups, batch_tokens=2048, packs=True):
    decoder = DecoderOnly(worker.live, language(worker.scorer).lm.max_length)
    assert decoder.shares
    decoder.shares = packs
    return LogLikelihoods(decoder, batch_tokens, None)(groups).answers


def assert_same(some, others, tolerance):
    assert some.keys() == others.keys()
    for number, answers in some.items():
        for (value, greedy), (other, also) in zip(answers, others[number], strict=True):
            assert value == pytest.approx(other, abs=tolerance)
            assert greedy == also
        values, rest = ([v for v, _ in a] for a in (answers, others[number]))
        assert values.index(max(values)) == rest.index(max(rest))


def test_packed_rows_say_what_separate_rows_say(written, groups):
    assert_same(forward(written, groups), forward(written, groups, packs=False), 1e-4)


@pytest.mark.parametrize("packs", [True, False])
def test_batches_do_not_matter(written, groups, packs):
    one_by_one = forward(written, groups, batch_tokens=64, packs=packs)
    assert_same(one_by_one, forward(written, groups, batch_tokens=2048, packs=packs), 1e-4)


def test_over_long_prompts_are_cut_as_lm_eval_cuts_them(prepared, written, groups, judged):
    answers, compared = forward(written, groups), 0
    for number, item in enumerate(prepared.tasks.items.dev):
        if item.task == "long":
            compared += 1
            assert min(len(c) for c, _ in groups[number].pairs) > language(written.scorer).lm.max_length
            theirs = [float(r[0]) for r in judged["long", item.index]["filtered_resps"]]
            assert [v for v, _ in answers[number]] == pytest.approx(theirs, abs=1e-4)
    assert compared == DEV["long"]


def test_live_model_is_the_exported_model(written, exported):
    module = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = torch.arange(3, 103)[None]
    with torch.inference_mode():
        assert torch.equal(written.live.module(ids).logits, module(ids).logits)


def test_parts_of_the_items_add_up(written, scores):
    count = len(scores)
    parts = [v for start in range(0, count, 7) for v in written.scorer.score(start, min(count, start + 7)).items]
    assert parts == pytest.approx(list(scores.values()), rel=1e-5)


def test_a_broken_model_fails_and_the_next_one_is_scored(make_config, models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite weights whose outputs are not
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    ready = prepare(config_at(make_config(tmp_path, {"experts.a": str(tmp_path / "broken")})))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    broken, sound, _ = ready.experts
    first = worker.evaluate(Candidate(0, sound, "test"))
    failed = worker.evaluate(Candidate(1, broken, "test"))
    again = worker.evaluate(Candidate(2, sound, "test"))
    assert (failed.status, failed.score, failed.items) == ("failed", None, ())
    assert "not finite" in failed.reason
    assert (again.status, again.items) == ("ok", first.items)


def test_examples_in_the_prompt_are_drawn_as_lm_eval_draws_them(prepared, written, judged):
    again = language(prepared.tasks.scorer(written.live, "dev"))  # the second time in a process as the first time
    shown = 0
    for number, item in enumerate(prepared.tasks.items.dev):
        if item.task == "shots":
            prompts = {p.prepared[number].requests[0].args[0] for p in (language(written.scorer), again)}
            assert prompts == {judged["shots", item.index]["arguments"][0][0]}
            assert prompts.pop().count("Question:") == 3
            shown += 1
    assert shown == DEV["shots"]


def test_no_scored_item_is_an_example_in_a_prompt(make_config, tmp_path):
    """This task has no examples of its own: lm-eval would take them from the very items that the report scores."""
    ready = prepare(config_at(make_config(tmp_path, {"evaluation.num_fewshot": 2})))
    part = language(Worker(ready.plan, "dev", tasks=ready.tasks).scorer)
    documents = list(ready.tasks.judges["toy"].library.tasks["toy"].eval_docs)
    scored = {documents[i.index]["question"] for s in ("dev", "report") for i in ready.tasks.items.of(s)}
    shown = set()
    for item in part.prepared:
        *examples, _ = item.requests[0].args[0].split("Question: ")[1:]
        assert len(examples) == 2
        shown |= {e.split("\n")[0] for e in examples}
    assert not shown & scored
    assert len(shown) > 10


def test_too_few_examples_beside_the_scored_items(make_config, tmp_path):
    task = [{"task": "toy", "dev": 80, "report": 28}]
    with pytest.raises(BadInput, match=r"num_fewshot: toy has 2 examples that are not scored items, but 3"):
        prepare(config_at(make_config(tmp_path, {"evaluation.num_fewshot": 3, "evaluation.tasks": task})))
    ready = prepare(config_at(make_config(tmp_path, {"evaluation.num_fewshot": 2, "evaluation.tasks": task})))
    Worker(ready.plan, "dev", tasks=ready.tasks)  # exactly as many as are wanted will do


def test_requests_that_repeat_are_scored_once(written):
    decoder = DecoderOnly(written.live, 128)
    rows = []
    monitor = LogLikelihoods(decoder, 2048, None)
    decoder.batch, batch = (lambda r: rows.append(r) or batch(r)), decoder.batch
    pairs = (((3, 4, 5), (6, 7)), ((3, 4, 5), (8,)))
    out = monitor({0: Group(pairs), 1: Group(pairs[::-1]), 2: Group((*pairs, pairs[0]))})
    assert [[r.continuations for r in batch] for batch in rows] == [[((6, 7), (8,))]]
    assert out.answers[1] == out.answers[0][::-1]
    assert out.answers[2] == [*out.answers[0], out.answers[0][0]]
    assert out.tokens == 4


def test_memory_that_does_not_suffice_halves_the_batch(written, groups, monkeypatch):
    expected = forward(written, groups)
    inner, sizes = DecoderOnly.score, []

    def score(self, batch):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, batch)

    monkeypatch.setattr(DecoderOnly, "score", score)
    likely = LogLikelihoods(DecoderOnly(written.live, 128), 2048, None)
    assert_same(likely(groups).answers, expected, 1e-4)
    tried = len(sizes)
    assert max(sizes) > 3
    likely(groups)
    assert max(sizes[tried:]) <= 3  # it is remembered


def test_a_row_that_never_fits_fails_with_its_reason(prepared, written, monkeypatch):
    def score(self, batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(DecoderOnly, "score", score)
    result = written.evaluate(Candidate(0, prepared.experts[0], "test"))
    assert result.status == "failed"
    assert result.reason.startswith("memory ran out; lower evaluation.batch_size")
    assert "a batch of one row does not fit into memory" in result.reason


def test_cut_and_empty_answers_are_counted(prepared, written, recipe, judged):
    result = written.evaluate(Candidate(0, recipe, "test"))
    written.live.write(written.materialiser.stream(recipe))
    items = prepared.tasks.items.dev
    invalid = sum(judged[i.task, i.index]["filtered_resps"][0] == "[invalid]" for i in items if i.task == "free")
    long = sum(i.task in ("long", "roll") for i in items)
    assert 0 < invalid < DEV["free"]
    assert result.counts["invalid"] == invalid
    assert result.counts["truncated"] >= DEV["long"]
    assert result.counts["tokens"] > 1000
    assert long == 16


@pytest.mark.parametrize(
    ("path", "has_test", "flagged"),
    [("allenai/ai2_arc", True, True), ("Rowan/hellaswag", False, False), ("json", True, False), ("LOCAL", True, False)],
)
def test_the_test_set_of_a_benchmark_as_dev_set_is_flagged(make_config, tmp_path, capsys, path, has_test, flagged):
    file = make_config(tmp_path, {"budget.candidates": 3})
    path = str(tmp_path) if path == "LOCAL" else path
    ready = prepare(config_at(file))
    judge = ready.tasks.judges["toy"]
    config = SimpleNamespace(dataset_path=path, custom_dataset=None)
    judge.library.tasks["toy"] = SimpleNamespace(config=config, has_test_docs=lambda: has_test)
    assert judge.library.is_test_set("toy") == flagged


def test_what_was_flagged_is_said_before_the_run_and_stands_in_the_report(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(library.Library, "is_test_set", lambda self, name: True)
    file = make_config(tmp_path, {"budget.candidates": 3})
    assert run_job([str(file), "--results", str(tmp_path / "results")]) == 0
    folder = tmp_path / "results" / "toy"
    assert "warning: the dev items of toy come from the test set of a public benchmark" in capsys.readouterr().out
    assert "> Warning: the dev items of toy come from the test set" in (folder / "report.md").read_text()


@pytest.mark.parametrize("rows", [1, 5])
def test_batch_size_is_the_most_rows(written, groups, rows):
    sizes = []
    decoder = DecoderOnly(written.live, 128)
    decoder.batch, batch = (lambda r: sizes.append(len(r)) or batch(r)), decoder.batch
    answers = LogLikelihoods(decoder, 2048, rows)(groups).answers
    assert max(sizes) == rows
    assert_same(answers, forward(written, groups), 1e-4)


def test_a_group_is_its_tasks_together(make_config, tmp_path):
    task = [{"task": "both", "dev": 50, "report": 60}]
    ready = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": task})))
    assert {i.task for i in ready.tasks.items.dev} == {"toy", "pair"}
    assert set(ready.tasks.scale("dev").tasks) == {"both"}
    assert len(Worker(ready.plan, "dev", tasks=ready.tasks).scorer.score(0, 50).items) == 50


def test_a_task_named_beside_its_group_is_refused(make_config, tmp_path):
    tasks = [{"task": "both", "dev": 50, "report": 60}, {"task": "toy", "dev": 50, "report": 20}]
    with pytest.raises(BadInput, match=r"evaluation.tasks\[1\].task: toy and both both contain toy"):
        prepare(config_at(make_config(tmp_path, {"evaluation.tasks": tasks})))


def test_perplexity_on_a_text_file(make_config, tmp_path, models):
    text = "\n\n".join(f"the red house {n} and the green river are old friends " * 6 for n in range(60))
    (tmp_path / "book.txt").write_text(text)
    task = [{"task": "book", "data": str(tmp_path / "book.txt"), "metric": "bits_per_byte", "dev": 6, "report": 4}]
    ready = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": task})))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    module = AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.float32)
    lm = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(models / "a"), batch_size=1)
    rows = read_rows(str(tmp_path / "book.txt"), "data")
    texts = [rows[i.index]["text"] for i in ready.tasks.items.dev]
    likelihoods = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), 0) for t in texts])
    bits = -sum(likelihoods) / sum(len(t.encode()) for t in texts) / math.log(2)
    assert result.score == pytest.approx(-bits, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"task": "toi"}, r"tasks\[0\].task: unknown lm-eval task 'toi'; did you mean 'toy'"),
        ({"task": "toy", "metric": "akk"}, r"tasks\[0\].metric: toy has no metric 'akk'; known: acc, acc_norm"),
        ({"task": "echo", "metric": "exact_match,fist"}, r"echo has no filter 'fist'; did you mean 'first'"),
        ({"task": "toy", "report_task": "par"}, r"tasks\[0\].report_task: unknown lm-eval task 'par'"),
    ],
)
def test_names_are_checked_before_any_weight_is_read(make_config, tmp_path, task, said, monkeypatch):
    monkeypatch.setattr("evolver.workers.worker.LiveModel", None)
    with pytest.raises(BadInput, match=said):
        prepare(config_at(make_config(tmp_path, {"evaluation.tasks": [{"dev": 5, "report": 5, **task}]})))


def test_own_tasks_do_not_wait_for_the_index_of_lm_eval(make_config, tmp_path, monkeypatch):
    def only_own(include_path=None, include_defaults=True):
        assert not include_defaults
        return TaskManager(include_path=include_path, include_defaults=include_defaults)

    monkeypatch.setattr(library, "TaskManager", only_own)
    assert len(prepare(config_at(make_config(tmp_path))).tasks.items.dev) == 40
