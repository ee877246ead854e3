"""Chat templates of merged models: where they come from, and that evaluation and export use the same one."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import toys
from toys import refused

from evolver.checkpoints.chat import NAMED, Wanted, resolve
from evolver.config.model import CHAT_FORMATS
from evolver.config.reading import config_at
from evolver.driver import prepare as driver
from evolver.driver.prepare import prepare
from evolver.evaluation.language.requests import ASKED
from evolver.merging.companions import Companions
from evolver.storage import storage_at

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STOP = 7  # a token of the toys' alphabet
STOPS = {"bos_token_id": 0, "eos_token_id": [1, STOP], "pad_token_id": 2}


def write_model(folder, template=None, stops=None, tokens=("<s>", "</s>", "<|im_end|>"), **settings):
    """The files of a model beside its weights."""
    folder.mkdir()
    ids = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **settings}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1, "vocab_size": len(tokens)}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if stops is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "top_p": 0.5}))
    return folder


def wanted(tmp_path, setting, needed=True):
    experts = {n: tmp_path / n for n in "abc" if (tmp_path / n).exists()}
    vocabulary = json.loads((tmp_path / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    return Wanted(setting, tmp_path / "base", experts, needed, lambda: vocabulary)


def test_the_named_formats_are_those_of_the_configuration():
    assert tuple(NAMED) == CHAT_FORMATS


def test_auto_is_the_template_of_the_base_where_it_has_one(tmp_path):
    write_model(tmp_path / "base", "the base's")
    write_model(tmp_path / "a", "another one", [1, 2])
    assert resolve(wanted(tmp_path, "auto")) == (None, [])


@pytest.mark.parametrize("place", ["file", "settings", "list"])
def test_auto_is_the_only_template_of_experts_where_the_base_has_none(tmp_path, place):
    write_model(tmp_path / "base")
    write_model(tmp_path / "a")
    listed = [{"name": "tools", "template": "other"}, {"name": "default", "template": "one"}]
    inside = {"settings": {"chat_template": "one"}, "list": {"chat_template": listed}}.get(place, {})
    write_model(tmp_path / "b", "one" if place == "file" else None, [1, 2], **inside)
    write_model(tmp_path / "c", "one", [1, 2])
    chat, said = resolve(wanted(tmp_path, "auto"))
    assert (chat.template, chat.generation["eos_token_id"], chat.special) == ("one", [1, 2], {"eos_token": "</s>"})
    assert len(said) == 1
    assert "the expert b" in said[0]


def test_the_same_template_with_other_stop_tokens_is_warned_of(tmp_path):
    write_model(tmp_path / "base")
    write_model(tmp_path / "a", "one", [1, 2])
    write_model(tmp_path / "b", "one", [1])
    chat, said = resolve(wanted(tmp_path, "auto"))
    assert chat.generation["eos_token_id"] == [1, 2]
    assert re.search("b has the same template with other stop tokens", said[0])


def test_two_templates_that_contradict_are_refused_where_one_is_needed(tmp_path):
    write_model(tmp_path / "base")
    write_model(tmp_path / "a", "one")
    write_model(tmp_path / "b", "two")
    refused(lambda: resolve(wanted(tmp_path, "auto")), "model.chat_template", "a and b differ", "expert a")
    chat, said = resolve(wanted(tmp_path, "auto", needed=False))
    assert chat is None
    assert "a and b differ" in said[0]
    assert resolve(wanted(tmp_path, "expert b"))[0].template == "two"


def test_an_expert_without_a_template_is_refused(tmp_path):
    write_model(tmp_path / "base")
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", "two")
    refused(lambda: resolve(wanted(tmp_path, "expert a")), "model.chat_template", "no chat template", "expert b")


def test_stop_tokens_get_the_numbers_of_the_merged_vocabulary(tmp_path):
    write_model(tmp_path / "base")
    write_model(tmp_path / "a", "one", [1, 2], ("<s>", "<|im_end|>", "</s>", "<pad>"), pad_token="<pad>")
    chat, _ = resolve(wanted(tmp_path, "auto"))
    assert chat.generation == {"eos_token_id": [2, 1], "top_p": 0.5}
    assert chat.special == {"eos_token": "</s>"}  # the base has no <pad>


def test_a_named_format_ends_at_its_own_token(tmp_path):
    write_model(tmp_path / "base")
    write_model(tmp_path / "a")
    chat, said = resolve(wanted(tmp_path, "chatml"))
    assert (chat.generation, said) == ({"eos_token_id": [1, 2]}, [])
    chat, said = resolve(wanted(tmp_path, "llama3"))
    assert chat.generation == {"eos_token_id": 1}
    assert "no token <|eot_id|>" in said[0]


def test_a_template_in_a_file(tmp_path):
    write_model(tmp_path / "base")
    (tmp_path / "mine.jinja").write_text("mine")
    assert resolve(wanted(tmp_path, str(tmp_path / "mine.jinja")))[0].template == "mine"
    refused(lambda: resolve(wanted(tmp_path, "chatmll")), "model.chat_template", "'chatmll'", "'chatml'")
    refused(lambda: resolve(wanted(tmp_path, str(tmp_path))), "model.chat_template", "cannot be read")


def test_a_template_that_is_no_text_is_refused(tmp_path):
    write_model(tmp_path / "base")
    (write_model(tmp_path / "a") / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    refused(lambda: resolve(wanted(tmp_path, "auto")), "experts.a", "chat_template.jinja", "copy the model again")


def test_companions_are_those_of_the_base_with_the_template_and_the_stop_tokens(tmp_path):
    write_model(tmp_path / "base", None, 1, chat_template="old")
    write_model(tmp_path / "a", "new", [1, 2])
    (tmp_path / "base" / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    chat, _ = resolve(wanted(tmp_path, "expert a"))
    with Companions(tmp_path / "base", chat).shown() as folder:
        assert folder != tmp_path / "base"
        assert (folder / "chat_template.jinja").read_text() == "new"
        read = {f.name: json.loads(f.read_text()) for f in folder.glob("*.json")}
    assert not folder.exists()
    assert read["tokenizer_config.json"] == {"eos_token": "</s>"}
    assert read["special_tokens_map.json"] == {"eos_token": "</s>"}
    assert read["generation_config.json"] == {"eos_token_id": [1, 2], "top_p": 0.5}
    assert read["config.json"]["eos_token_id"] == [1, 2]
    with Companions(tmp_path / "base").shown() as folder:
        assert folder == tmp_path / "base"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.chat_template": "expert d"}, ["model.chat_template", "'d'"]),
        ({"model.chat_template": "expert"}, ["model.chat_template", "no expert ''"]),
        ({"model.chat_template": "chatml", "model.kind": "classifier"}, ["model.chat_template", "classifier"]),
    ],
)
def test_templates_of_nobody_are_refused(make_config, tmp_path, changes, says):
    refused(lambda: config_at(make_config(tmp_path, changes)).parsed(), *says)


@pytest.fixture(scope="module")
def instructed(models, tmp_path_factory):
    """The toys, of which the experts have a chat template and one more stop token; the base has neither."""
    folder = tmp_path_factory.mktemp("instructed")
    for name in ("base", "a", "b", "c"):
        shutil.copytree(models / name, folder / name)
        if name != "base":
            (folder / name / "chat_template.jinja").write_text(TEMPLATE)
            (folder / name / "generation_config.json").write_text(json.dumps(STOPS))
    return folder


@pytest.fixture
def chatting(make_config, instructed):
    def make(folder, **changes):
        places = {"model.base": str(instructed / "base")}
        places |= {f"experts.{name}": str(instructed / name) for name in ("a", "b", "c")}
        given = {k.replace("__", "."): v for k, v in changes.items()}
        return make_config(folder, {**places, "evaluation.apply_chat_template": True, **toys.SHORT, **given})

    return make


@pytest.mark.whole
def test_a_search_uses_the_template_of_the_experts_and_exports_it(chatting, instructed, tasks, tmp_path):
    """Report rows are lm-eval's, of the weights as they are with an expert's tokenizer."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    file = chatting(tmp_path, evaluation__tasks=[{"task": t, "metric": m, "dev": 12, "report": 8}
                                                 for t, m in (("toy", "acc"), ("free", "exact_match"))])  # fmt: skip
    done = toys.evolver("run", file, "--results", tmp_path / "results")
    assert done.code == 0, done.err
    assert "the template and the stop tokens of the expert a" in done.out + done.err
    run = tmp_path / "results" / "toy"
    best = run / "best"
    assert (best / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((best / "generation_config.json").read_text())["eos_token_id"] == [1, STOP]
    agreement = json.loads((run / "best.json").read_text())
    assert agreement["equal"] == agreement["items"] == 24

    items = prepare(config_at(file)).tasks.items.report
    indices = {t: sorted(i.index for i in items if i.task == t) for t in ("toy", "free")}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    of_base = {"pretrained": str(instructed / "base"), "tokenizer": str(instructed / "a"), "dtype": "float32"}
    for row, given in {"base": of_base, "winner": {"pretrained": str(best), "dtype": "float32"}}.items():
        out = simple_evaluate(
            "hf", given, tasks=["toy", "free"], task_manager=manager, samples=indices, apply_chat_template=True,
            fewshot_as_multiturn=True, bootstrap_iters=0, device="cpu", fewshot_random_seed=1,
        )  # fmt: skip
        theirs = {t: [s[m] for s in out["samples"][t]] for t, m in (("toy", "acc"), ("free", "exact_match"))}
        expected = sum(sum(v) / len(v) for v in theirs.values()) / len(theirs)
        assert json.loads((run / "summary.json").read_text())["report"][row] == pytest.approx(expected), row


@pytest.mark.whole
@pytest.mark.parametrize(
    ("setting", "said"),
    [("chatml", "<|im_start|>user\n"), ("expert b", "[user]"), ("alpaca", "### Instruction:\n")],
)
def test_prompts_can_be_looked_at(chatting, tmp_path, setting, said):
    file = chatting(tmp_path, model__chat_template=setting, evaluation__system_instruction="Be brief.")
    done = toys.evolver("explain", file, "--prompts")
    assert done.code == 0, done.err
    assert done.out.count("toy, dev item") == 2
    assert said in done.out
    assert "Be brief." in done.out
    assert done.out.count("→ ") == 2 * 4  # the choices


@pytest.mark.whole
def test_prompts_of_generated_answers_say_what_ends_them(chatting, tmp_path):
    entry = {"task": "free", "metric": "exact_match", "dev": 12, "report": 8}
    done = toys.evolver("explain", chatting(tmp_path, evaluation__tasks=[entry]), "--prompts")
    assert done.code == 0, done.err
    assert "→ an answer of at most 6 tokens, which 's', '</s>' ends" in done.out


@pytest.mark.whole
def test_what_prompts_cannot_be_shown_of_is_refused(chatting, tmp_path):
    entry = {"task": "mine", "function": "mine.py:score", "data": "mine.jsonl", "dev": 1, "report": 1}
    (tmp_path / "mine.py").write_text("def score(model, items):\n    return [1.0 for _ in items]\n")
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    entry |= {"function": f"{tmp_path}/mine.py:score", "data": str(tmp_path / "mine.jsonl")}
    file = chatting(tmp_path, evaluation__tasks=[entry], evaluation__apply_chat_template=False)
    done = toys.evolver("explain", file, "--prompts")
    assert "none of its tasks has prompts" in toys.refusal(done.code, done.err)


@pytest.mark.whole
def test_contradicting_templates_are_refused_by_validate(chatting, instructed, tmp_path):
    other = shutil.copytree(instructed / "b", tmp_path / "b")
    (other / "chat_template.jinja").write_text("Other" + TEMPLATE)
    file = chatting(tmp_path, experts__b=str(other))
    done = toys.evolver("validate", file)
    assert "a and b differ" in toys.refusal(done.code, done.err)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    file = chatting(
        tmp_path, model__chat_template=str(tmp_path / "broken.jinja"), evaluation__apply_chat_template=False
    )
    done = toys.evolver("validate", file)
    assert "cannot be applied" in toys.refusal(done.code, done.err)
    assert ASKED not in done.err
    assert not (tmp_path / "results").exists()


@pytest.mark.whole
def test_the_template_belongs_to_the_run(chatting, instructed, tmp_path):
    """The run is made with what was resolved: another template is another run, the same one elsewhere is not."""
    file = chatting(tmp_path)
    toys.run_here(file, tmp_path / "results")
    same = chatting(tmp_path, model__chat_template="expert b")
    toys.run_here(same, tmp_path / "results", toys.no_work)
    other = chatting(tmp_path, model__chat_template="alpaca")
    refused(lambda: toys.run_here(other, tmp_path / "results"), "another configuration (model.chat_template")


@pytest.mark.whole
def test_a_run_that_is_older_than_the_key_goes_on_as_it_began(chatting, tmp_path, monkeypatch):
    """Then models kept the base's files, whatever the experts had."""
    without = {"evaluation__apply_chat_template": False}
    with monkeypatch.context() as before:
        made = driver._identity

        def older(*given):
            identity = made(*given)
            del identity["model"]["chat_template"]
            return identity

        before.setattr(driver, "_identity", older)
        run = toys.run_here(chatting(tmp_path, model__chat_template="base", **without), tmp_path / "results")
    assert "chat_template" not in json.loads((run / "identity.json").read_text())["model"]
    recorded, file = toys.rows(run), chatting(tmp_path, **without)
    toys.run_here(file, tmp_path / "results", toys.no_work)
    assert toys.rows(run) == recorded != {}
    assert not (run / "best" / "chat_template.jinja").exists()
    assert prepare(config_at(file), run=storage_at(run)).opened.companions.chat is None
    assert prepare(config_at(file)).opened.companions.chat is not None  # as a new run


@pytest.mark.whole
def test_models_are_evaluated_with_the_template_that_they_lack(chatting, instructed, tmp_path):
    from evolver.commands.evaluate import score_models

    file = str(chatting(tmp_path))
    whole = shutil.copytree(instructed / "base", tmp_path / "whole")
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copyfile(instructed / "a" / name, whole / name)
    bare, own = score_models(file, [str(instructed / "base"), str(whole)], "report", lambda _: None)
    assert bare.tasks == own.tasks
    of_base = str(chatting(tmp_path, model__base=str(whole), experts__b=str(instructed / "base")))
    (again,) = score_models(of_base, [str(instructed / "base")], "report", lambda _: None)
    assert again.tasks == own.tasks
