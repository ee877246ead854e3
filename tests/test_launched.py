"""Candidates evaluated by lm-eval's own model classes, started on a folder in node-local memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from toys import rows, run_here

from evolver.errors import BadInput
from evolver.evaluation.launched import MEMORY
from evolver.records import Candidate
from evolver.run import prepare
from evolver.worker import Worker

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


def left():
    return {p for p in MEMORY.glob("evolver-*") if p.is_dir()}


def test_lm_evals_own_class_gives_the_same_scores(make_config, tmp_path):
    results = {}
    for name, changes in (("resident", {}), ("hf", HF)):
        ready = prepare(str(make_config(tmp_path, {"evaluation.tasks": TASKS, **changes}, f"{name}.yaml")))
        worker = Worker(ready.plan, "dev", tasks=ready.tasks)
        found = [worker.evaluate(Candidate(n, e, "test")) for n, e in enumerate(ready.experts)]
        worker.close()
        assert not [r.reason for r in found if r.status != "ok"]
        results[name] = found
    for ours, theirs in zip(results["resident"], results["hf"], strict=True):
        assert list(ours.items) == pytest.approx(list(theirs.items), rel=1e-4)
    assert len({r.items for r in results["hf"]}) == 3


def test_a_whole_run_leaves_nothing_in_memory(make_config, tmp_path):
    before = left()
    file = make_config(tmp_path, {"evaluation.tasks": TASKS[:2], "budget.candidates": 4, **HF})
    folder = run_here(file, tmp_path / "results")
    assert not [r["reason"] for r in rows(folder).values() if r["status"] != "ok"]
    assert json.loads((folder / "best.json").read_text()) == {"items": 35, "equal": 35}
    assert left() == before


def test_what_a_killed_process_left_is_swept(make_config, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = MEMORY / f"evolver-{gone.pid}-stale"
    stale.mkdir()
    ready = prepare(str(make_config(tmp_path, {"evaluation.tasks": TASKS[:1], **HF})))
    Worker(ready.plan, "dev", tasks=ready.tasks).close()
    assert not stale.exists()


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


def test_a_server_is_started_for_each_candidate_and_stopped(served, tmp_path):
    before = left()
    ready = prepare(str(served))
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
    assert left() == before


def test_a_server_that_ends_is_a_failed_result_with_its_last_words(served, tmp_path):
    ready = prepare(str(served))
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


def test_backends_are_checked(make_config, encoders_config, tmp_path):
    with pytest.raises(BadInput, match=r"evaluation\.backend: unknown backend 'vlm'; did you mean 'vllm'"):
        prepare(str(make_config(tmp_path, {"evaluation.backend": "vlm"})))
    with pytest.raises(BadInput, match=r"evaluation\.backend: mine is no task of lm-eval; write resident"):
        prepare(str(encoders_config))


@pytest.fixture
def encoders_config(make_config, tasks, tmp_path):
    (tmp_path / "mine.py").write_text("def score(model, items):\n    return [1.0 for _ in items]\n")
    task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:score", "data": str(tasks / "toy.jsonl")}
    changes = {"evaluation.tasks": [{**task, "dev": 4, "report": 4}], "evaluation.backend": "hf"}
    return make_config(tmp_path, changes, "function.yaml")


def test_a_backend_that_is_not_installed_is_said_so(make_config, tmp_path):
    ready = prepare(str(make_config(tmp_path, {"evaluation.tasks": TASKS[:1], "evaluation.backend": "vllm"})))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    worker.close()
    assert result.status == "failed"
    assert "vllm" in result.reason
