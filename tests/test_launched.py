"""Candidates evaluated by lm-eval's own model classes, started on a folder in node-local memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from toys import DROP, ROOT, Silent, rows, run_here

from cluster import job
from evolver.commands.evaluate import score_models
from evolver.config.reading import config_at, load
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.language import scratch
from evolver.evaluation.language.launched import LaunchedModel, LaunchedScorer
from evolver.evaluation.language.requests import Judgement
from evolver.evaluation.language.scratch import Scratch
from evolver.records import Candidate
from evolver.storage import storage_at
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

TASKS = [
    {"task": "toy", "dev": 20, "report": 10},
    {"task": "echo", "metric": "exact_match", "dev": 15, "report": 10},
    {"task": "roll", "metric": "word_perplexity", "dev": 4, "report": 4},
]
HF = {
    "evaluation.backend": "hf",
    "evaluation.model_args": {"dtype": "float32", "device": "cpu"},
    "evaluation.batch_size": 4,
}
# Answers every completion with the last word of its prompt; dies for the candidate whose folder says so.
SERVER = """
import http.server, json, pathlib, sys
port, model = int(sys.argv[1]), pathlib.Path(sys.argv[2])
log = pathlib.Path(__file__).parent / "started.txt"
log.open("a").write(str((model / "model.safetensors").stat().st_size) + "\\n")
if (pathlib.Path(__file__).parent / "die").exists():
    sys.exit("no room for the model")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"data": [{"id": "m"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
        said = [{"index": i, "text": " " + str(p).split()[-1]} for i, p in enumerate(prompts)]
        self.reply({"choices": said})
    def reply(self, what):
        body = json.dumps(what).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


# Makes a folder and starts a server with a child of its own, then dies without a word.
KILLED = """
import os, pathlib, subprocess, sys
from evolver.evaluation.language import scratch
scratch.MEMORY = pathlib.Path(sys.argv[1])
held = scratch.Scratch(0)
server = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"], start_new_session=True)
held.watch(server.pid)
print(server.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(scratch, "MEMORY", tmp_path / "memory")
    return tmp_path / "memory"


def test_candidates_lie_in_memory_where_there_is_room(memory, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for room, place in ((0, memory), (1 << 60, tmp_path)):
        held = Scratch(room)
        assert held.path.parent == place
        held.close()
        held.close()
        assert not held.path.exists()


def until(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def runs(group):
    """Whether a process of a group does; one that nobody has asked for its status is a zombie and does not."""
    found = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True, check=True).stdout.split("\n")
    return any(line.split()[0] == str(group) and "Z" not in line for line in found if line)


def test_what_is_killed_leaves_no_folder_and_no_server(memory):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(memory)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert killed.returncode == -9
    assert until(lambda: not list(memory.iterdir()))
    assert until(lambda: not runs(int(killed.stdout)))


def test_what_nobody_could_remove_is_swept_and_what_is_in_use_stays(memory):
    stale = memory / "evolver-candidate-stale"
    stale.mkdir()
    (stale / "lock").touch()
    first = Scratch(0)
    assert not stale.exists()
    second = Scratch(0)
    assert first.path.exists()
    first.close()
    second.close()
    assert not list(memory.iterdir())


def test_lm_evals_own_class_gives_the_same_scores(make_config, tmp_path):
    results = {}
    for name, changes in (("resident", {}), ("hf", HF)):
        ready = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": TASKS, **changes}, f"{name}.yaml")))
        worker = Worker(ready.plan, "dev", tasks=ready.tasks)
        found = [worker.evaluate(Candidate(n, e, "test")) for n, e in enumerate(ready.experts)]
        worker.close()
        assert not [r.reason for r in found if r.status != "ok"]
        results[name] = found
    for ours, theirs in zip(results["resident"], results["hf"], strict=True):
        assert list(ours.items) == pytest.approx(list(theirs.items), rel=1e-4)
    assert len({r.items for r in results["hf"]}) == 3


def test_a_whole_run_leaves_nothing_in_memory(make_config, memory, tmp_path):
    changes = {
        "evaluation.tasks": TASKS[:2],
        "budget.candidates": 2,
        "baselines.masses": [1.0],
        "experts.c": DROP,
        **HF,
    }
    file = make_config(tmp_path, changes)
    folder = run_here(file, tmp_path / "results")
    assert not [r["reason"] for r in rows(folder).values() if r["status"] != "ok"]
    assert json.loads((folder / "best.json").read_text()) == {"items": 35, "equal": 35}
    assert not list(memory.iterdir())


@pytest.fixture
def served(make_config, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    changes = {
        "evaluation.tasks": TASKS[1:2],
        "evaluation.backend": "local-completions",
        "evaluation.serve": f"{sys.executable} {tmp_path / 'server.py'} {{port}} {{model}}",
        "evaluation.model_args": {
            "base_url": "http://127.0.0.1:{port}/v1/completions", "tokenizer": "{model}", "max_length": 128,
            "tokenized_requests": False, "num_concurrent": 1,
        },
    }  # fmt: skip
    return make_config(tmp_path, changes)


def test_a_server_is_started_for_each_candidate_and_stopped(served, memory, tmp_path):
    ready = prepare(config_at(served))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    results = [worker.evaluate(Candidate(n, e, "test")) for n, e in enumerate(ready.experts[:2])]
    server = worker.live._server
    assert not [r.reason for r in results if r.status != "ok"]
    documents = list(ready.tasks.judges["echo"].library.tasks["echo"].eval_docs)
    expected = [
        float(documents[i.index]["said"] == " " + documents[i.index]["question"].split()[-1])
        for i in ready.tasks.items.dev
    ]
    assert list(results[0].items) == expected
    assert len((tmp_path / "started.txt").read_text().split()) == 2
    worker.close()
    assert server.poll() is not None
    assert not list(memory.iterdir())


def test_a_server_that_ends_is_a_failed_result_with_its_last_words(served, tmp_path):
    ready = prepare(config_at(served))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    (tmp_path / "die").touch()
    dead = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert (dead.status, dead.reason) == (
        "failed",
        "RuntimeError: the server ended with status 1: no room for the model",
    )
    (tmp_path / "die").unlink()
    assert worker.evaluate(Candidate(1, ready.experts[1], "test")).status == "ok"
    worker.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.backend": "vlm"}, r"evaluation\.backend: unknown backend 'vlm'; did you mean 'vllm'"),
        ({"evaluation.backend": "hf", "model.kind": "seq2seq"}, r"evaluation\.backend: hf ties the heads of encoder"),
        (
            {"evaluation.backend": "openai-completions"},
            r"evaluation\.backend: openai-completions cannot score candidates",
        ),
        (
            {"evaluation.backend": "local-completions"},
            r"evaluation\.serve: missing; local-completions needs a server",
        ),
        ({"evaluation.backend": "steered"}, r"evaluation\.model_args\.steer_path: missing; steered cannot start"),
        (
            {**HF, "evaluation.model_args": {"device": "cpu", "gpu_memory_utilization": 0.5}},
            r"evaluation\.model_args\.gpu_memory_utilization: hf does not read this key, which belongs to vllm",
        ),
        (
            {**HF, "evaluation.serve": "true"},
            r"evaluation\.serve: hf talks to no server, so the command would do nothing; leave",
        ),
        (
            {**HF, "evaluation.batch_tokens": 2048},
            r"evaluation\.batch_tokens: the backend hf does not read this key; leave it out",
        ),
        ({"evaluation.serve": "true"}, r"evaluation\.serve: the backend resident does not read this key; leave it out"),
        (
            {"evaluation.model_args": {"max_model_len": 9}},
            r"evaluation\.model_args: the backend resident does not read this key; leave it out",
        ),
    ],
)
def test_backends_are_checked(make_config, tmp_path, changes, said):
    with pytest.raises(BadInput, match=said):
        prepare(config_at(make_config(tmp_path, changes)))


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_a_missing_accelerator_is_found_before_a_run(make_config, tmp_path, without_gpu):
    given = config_at(make_config(tmp_path, {**HF, "evaluation.model_args": {"dtype": "float32"}}))
    says = r"evaluation\.model_args\.device: hf computes on cuda.*write device: cpu"
    with pytest.raises(BadInput, match=f"^{given.origin}: {says}"):
        job.run_here(given, storage_at(tmp_path / "results"), None, Silent())
    assert not (tmp_path / "results").exists()
    with pytest.raises(BadInput, match=says):
        score_models(given.origin, ["model"], "dev")
    assert job.device_of(load(make_config(tmp_path, HF)), "run.yaml") == "cpu"


def test_a_driver_without_an_accelerator_leaves_it_to_the_workers(make_config, tmp_path, without_gpu):
    """Whether those of a Ray cluster have one is seen where they are."""
    changes = {**HF, "evaluation.model_args": {"dtype": "float32"}, "pool": {"kind": "ray"}}
    given = config_at(make_config(tmp_path, changes))
    ready = prepare(given, device=job.device_of(given.parsed(), given.origin))
    with pytest.raises(BadInput, match=r"^evaluation\.model_args\.device: hf computes on cuda"):
        Worker(ready.plan, "dev", "on a node", ready.tasks)


@pytest.mark.parametrize("pool", [{}, {"kind": "local"}])
def test_keys_of_ray_actors_are_said_to_do_nothing_on_this_machine(make_config, tmp_path, monkeypatch, pool):
    monkeypatch.setattr(job, "run", lambda *_: None)
    lines = Silent()
    changes = {"pool": {**pool, "num_workers": 2, "num_gpus": 0.5, "resources": {"a100": 1}}}
    job.run_here(config_at(make_config(tmp_path, changes)), storage_at(tmp_path), None, lines)
    assert [line.partition(" does nothing")[0] for line in lines.lines] == [
        "warning: pool.num_gpus", "warning: pool.resources"
    ]  # fmt: skip
    ours = load(make_config(tmp_path, {"pool": {**changes["pool"], "kind": "ray"}})).pool
    assert job.unread_by_pool(ours) == []


@pytest.mark.parametrize("backend", ["vllm", "sglang", "hf"])
def test_the_base_has_what_a_backend_reads_in_a_candidates_folder(make_config, models, tmp_path, monkeypatch, backend):
    monkeypatch.setattr("evolver.evaluation.language.launched.check_backend", lambda *_: None)  # it is not installed

    def check(**changes):
        prepare(config_at(make_config(tmp_path, {"evaluation.backend": backend, **changes})), device="cpu")

    check()
    with pytest.raises(BadInput, match=r"evaluation\.apply_chat_template: the base's tokenizer has no chat template"):
        check(**{"evaluation.apply_chat_template": True})
    shutil.copytree(models / "base", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"model\.base: .*/mute has no tokenizer that can be read .*no tokenizer\.json"):
        check(**{"model.base": str(tmp_path / "mute")})
    elsewhere = {"evaluation.model_args": {"tokenizer": str(models / "base")}}
    check(**{"model.base": str(tmp_path / "mute"), **elsewhere})


def test_what_is_no_task_of_lm_eval_stays_with_the_resident_model(make_config, tasks, tmp_path):
    (tmp_path / "mine.py").write_text("def score(model, items):\n    return [1.0 for _ in items]\n")
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    file = make_config(tmp_path, {"evaluation.tasks": [{**task, "dev": 4, "report": 4}], "evaluation.backend": "hf"})
    with pytest.raises(BadInput, match=r"evaluation\.backend: mine is not a task of lm-eval; write resident"):
        prepare(config_at(file))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.backend": "vllm"}, "evaluation.backend: vllm needs vllm; run `pip install 'lm-eval[vllm]'`."),
        (
            {"evaluation.backend": "local-completions", "evaluation.serve": "vlllm serve {model}"},
            "evaluation.serve: there is no program 'vlllm' on this machine; install it, or give its path.",
        ),
        (
            {"evaluation.backend": "local-completions", "evaluation.serve": "serve 'it {model}"},
            'evaluation.serve: "serve \'it {model}" is no command (No closing quotation); correct it.',
        ),
        (
            {"evaluation.backend": "local-completions", "evaluation.serve": " "},
            "evaluation.serve: ' ' is no command (it is empty); correct it.",
        ),
        (
            {"evaluation.backend": "mamba_ssm"},
            "evaluation.backend: mamba_ssm needs mamba_ssm; run `pip install 'lm-eval[mamba]'`.",
        ),
        (
            {"evaluation.backend": "vllm-vlm"},
            "evaluation.backend: vllm-vlm needs vllm; run `pip install 'lm-eval[vllm]'`.",
        ),
    ],
)
def test_what_is_not_installed_is_one_sentence(make_config, memory, tmp_path, changes, said):
    file = make_config(tmp_path, {"evaluation.tasks": TASKS[:1], **changes})
    with pytest.raises(BadInput) as caught:
        prepare(config_at(file))
    assert str(caught.value) == f"{file}: {said}"
    with pytest.raises(BadInput) as caught:  # a worker may stand on another machine
        LaunchedModel(load(file).evaluation, 1 << 10)
    assert str(caught.value) == said
    assert not list(memory.iterdir())


def test_every_repeat_is_asked_for():
    """A sampled answer said three times would not be three samples."""
    judged = []
    item = SimpleNamespace(
        kind="generate_until",
        requests=[SimpleNamespace(request_type="generate_until", repeats=3)],
        judge=lambda answers: judged.append(answers) or Judgement(0.0, False),
    )
    lm = SimpleNamespace(generate_until=lambda requests: [f"sample {n}" for n in range(len(requests))])
    LaunchedScorer(SimpleNamespace(lm=lm), lambda lm: [item, item]).score([0, 1])
    assert judged == [[["sample 0", "sample 1", "sample 2"]], [["sample 3", "sample 4", "sample 5"]]]
