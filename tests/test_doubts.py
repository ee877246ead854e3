"""What is odd about experts is said in one line that names both models, and keeps nothing from being merged."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file

from evolver.checkpoints import doubts as module
from evolver.checkpoints.doubts import FAR, suspicions
from evolver.checkpoints.sources import open_base, open_expert
from evolver.errors import BadInput

pytestmark = pytest.mark.whole

MLP = "model.layers.0.mlp.up_proj.weight"


def tensors(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(8, 6, generator=draw),
        MLP: torch.randn(10, 6, generator=draw),
        "model.norm.weight": torch.randn(6, generator=draw),
        "model.scale": torch.tensor(2.0),
        "model.steps": torch.tensor(3),
    }


def write(folder, content, **config):
    folder.mkdir(parents=True)
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder


def moved(seed, by, content=None):
    """The tensors with noise of this size relative to each of them."""
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in (content or tensors()).items():
        noise = torch.randn(tensor.shape, generator=draw)
        out[name] = tensor + by * noise * tensor.norm() / noise.norm() if tensor.is_floating_point() else tensor
    return out


@pytest.fixture
def base(tmp_path):
    return open_base(str(write(tmp_path / "base", tensors())))


def said(base, *folders):
    return suspicions(base, [open_expert(str(f), base, f"experts.{f.name}") for f in folders])


def test_nothing_is_said_of_fine_tunes(tmp_path, base):
    folders = [write(tmp_path / str(by), moved(n, by)) for n, by in enumerate((1e-4, 0.01, 0.1, 0.4))]
    assert said(base, *folders) == []


def test_an_expert_that_is_the_base(tmp_path, base):
    same = write(tmp_path / "same", tensors() | {"model.steps": torch.tensor(4)})
    (line,) = said(base, same, write(tmp_path / "other", moved(1, 0.1)))
    assert line == f"experts.same ({same}) equals the base ({base.path}) in every floating tensor, so it adds nothing."


def test_an_adapter_that_was_never_trained_is_the_base(tmp_path, base):
    folder = tmp_path / "lora"
    folder.mkdir()
    key = f"base_model.model.{MLP.removesuffix('.weight')}.lora_"
    save_file({f"{key}A.weight": torch.ones(2, 6), f"{key}B.weight": torch.zeros(10, 2)}, folder / "adapter_model.safetensors")  # fmt: skip  # noqa: E501
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4}')
    (line,) = said(base, folder)
    assert line.startswith(f"experts.lora ({folder}) equals the base ({base.path})")


def test_an_expert_that_is_given_twice(tmp_path, base):
    one, other = write(tmp_path / "one", moved(1, 0.1)), write(tmp_path / "other", moved(2, 0.1))
    copy = shutil.copytree(one, tmp_path / "copy")
    (line,) = said(base, one, other, copy)
    assert line == f"experts.copy ({copy}) is the same model as experts.one ({one}), which therefore counts twice."


def test_a_model_that_is_no_fine_tune_of_the_base(tmp_path, base):
    far = write(tmp_path / "far", tensors(seed=1))
    kinds = [(t.double(), tensors()[n].double()) for n, t in tensors(seed=1).items() if t.is_floating_point()]
    distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in kinds) / sum(float(b.square().sum()) for _, b in kinds))  # fmt: skip  # noqa: E501
    assert distance > FAR
    (line,) = said(base, far)
    assert line.startswith(f"experts.far ({far}) is {distance:.2f} norms of the base away from the base ({base.path})")
    assert "\n" not in line


@pytest.mark.parametrize(("by", "count"), [(FAR - 0.01, 0), (FAR + 0.01, 1)])
def test_the_threshold_is_where_it_says(tmp_path, base, by, count):
    assert len(said(base, write(tmp_path / "m", moved(1, by)))) == count


def test_unrelated_models_are_beyond_it_and_toy_fine_tunes_are_not(models, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    base = open_base(str(models / "base"))
    torch.manual_seed(77)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "base")).save_pretrained(tmp_path / "new")
    distances = [module._survey(open_expert(str(f), base, "k"), base) for f in (models / "a", tmp_path / "new")]
    assert distances[0] < FAR < 1.2 < distances[1] < 1.5


def test_weights_are_never_compared_twice(tmp_path, base, monkeypatch):
    folder = write(tmp_path / "m", moved(1, 0.1))
    assert said(base, folder) == []
    monkeypatch.setattr(module, "_distance", lambda *_: pytest.fail("read again"))
    assert said(base, folder) == []
    monkeypatch.undo()
    save_file(tensors(seed=1), folder / "model.safetensors")
    assert len(said(base, folder)) == 1


def test_a_comparison_holds_pieces_only(tmp_path):
    """Tensors are mapped; in float64 there is one piece at a time, whatever their size."""
    code = """
import resource, sys
from evolver.checkpoints.doubts import suspicions
from evolver.checkpoints.sources import open_base, open_expert
base = open_base(sys.argv[1])
expert = open_expert(sys.argv[2], base, "k")
base.digest(), expert.digest()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
suspicions(base, [expert])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    large = {"model.embed_tokens.weight": torch.ones(6000, 5000, dtype=torch.bfloat16)}  # in float64 240 MB
    folders = [str(write(tmp_path / n, {k: t * s for k, t in large.items()})) for n, s in (("base", 1), ("m", 1.5))]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000  # kB; the files are mapped already


def test_an_adapter_whose_product_overflows_is_refused(tmp_path):
    base = open_base(str(write(tmp_path / "base", {n: t.half() for n, t in tensors().items() if n != "model.steps"})))
    folder = tmp_path / "lora"
    folder.mkdir()
    key = f"base_model.model.{MLP.removesuffix('.weight')}.lora_"
    save_file({f"{key}A.weight": torch.full((2, 6), 1e3), f"{key}B.weight": torch.full((10, 2), 1e3)}, folder / "adapter_model.safetensors")  # fmt: skip  # noqa: E501
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4}')
    for _ in range(2):
        with pytest.raises(BadInput, match=rf"^experts\.lora: {folder} makes weights of its base that are not finite"):
            said(base, folder)


@pytest.mark.parametrize("head", ["embedding", "its own"])
def test_a_head_that_the_base_ties(tmp_path, head):
    """Stored under its second name it is no other tensor; one that was trained is merged with the base's embedding."""
    base = open_base(str(write(tmp_path / "base", tensors(), tie_word_embeddings=True)))
    content = moved(1, 0.1)
    second = content["model.embed_tokens.weight"].clone()
    content["lm_head.weight"] = second if head == "embedding" else second + 1
    before = base.digest()
    assert said(base, write(tmp_path / "m", content, tie_word_embeddings=head == "embedding")) == []
    own = head == "its own"
    assert ("lm_head.weight" in base.names()) == own
    assert base.config["tie_word_embeddings"] != own
    assert base.digest() == before  # of what the file holds
    if own:
        assert torch.equal(base.tensor("lm_head.weight"), base.tensor("model.embed_tokens.weight"))


LLAMA = {"num_attention_heads": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-05, the base's 1e-06"]),
        ({"num_attention_heads": 3, "hidden_act": "gelu"}, ['hidden_act is "gelu", the base\'s "silu"', "heads is 3"]),
        ({"rope_theta": 5e5}, ["rope_theta is 500000.0, the base's 10000.0"]),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, ["rope_theta is 1000000.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ['"rope_type": "linear"', "the base's null"]),
        ({"rope_scaling": {"rope_type": "default"}}, []),
        ({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, []),
        ({"rms_norm_eps": 9.999999974752427e-07, "max_position_embeddings": 9, "use_cache": False}, []),
    ],
)
def test_settings_that_change_what_weights_compute(tmp_path, changes, words):
    base = open_base(str(write(tmp_path / "base", tensors(), **LLAMA, rope_scaling=None)))
    other = write(tmp_path / "other", moved(1, 0.1), **(LLAMA | changes))
    lines = said(base, other)
    assert len(lines) == bool(words)
    if words:
        assert lines[0].startswith(f"experts.other ({other}) has other settings")
        assert "computed with the base's" in lines[0]
        assert all(word in lines[0] for word in words), lines[0]


def configure(tmp_path, base, models):
    entries = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": str(base), "models": entries}))
    return file


def evolver(*arguments):
    code = "from evolver.commands.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_merge_warns_and_goes_on(tmp_path, base):
    one = write(tmp_path / "one", moved(1, 0.1))
    copy, same = shutil.copytree(one, tmp_path / "copy"), write(tmp_path / "same", tensors())
    far = write(tmp_path / "far", tensors(seed=1))
    file = configure(tmp_path, base.path, [one, copy, same, far])
    done = evolver("merge", file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"warning: {file}: ") for line in lines)
    for line, words in zip(lines, ((copy, one, "same model"), (same, base.path, "equals"), (far, base.path, "away")), strict=True):  # fmt: skip  # noqa: E501
        assert all(str(word) in line for word in words)
    merged, parts = load_file(tmp_path / "out" / "model.safetensors"), [moved(1, 0.1), moved(1, 0.1), tensors(seed=1)]
    wanted = tensors()[MLP] + 0.5 * sum(p[MLP] - tensors()[MLP] for p in parts)
    assert torch.allclose(merged[MLP], wanted, atol=1e-5)
    assert merged["model.steps"] == 3
    quiet = evolver("merge", file, tmp_path / "quiet", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_the_base_among_the_models_is_no_expert(tmp_path, base):
    file = configure(tmp_path, base.path, [base.path, write(tmp_path / "one", moved(1, 0.1))])
    done = evolver("merge", file, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_adapter_of_another_model_is_refused(tmp_path, base):
    """``model+adapter``, where the model is no fine-tune of base_model."""
    less = {n: t for n, t in tensors().items() if n != "model.norm.weight"}
    other = write(tmp_path / "other", less)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    file = configure(tmp_path, base.path, [f"{other}+{tmp_path / 'lora'}"])
    done = evolver("merge", file, tmp_path / "out")
    assert done.returncode == 2
    assert f"{other} lacks the tensor model.norm.weight" in done.stderr
    file = configure(tmp_path, base.path, [f"{tmp_path / 'lora'}+{tmp_path / 'lora'}"])
    done = evolver("merge", file, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_run_warns_and_goes_on(make_config, models, tmp_path):
    copy = shutil.copytree(models / "a", tmp_path / "copy")
    same = shutil.copytree(models / "base", tmp_path / "same")
    display = toys.Silent()
    changes = {"experts.b": str(copy), "experts.c": str(same), "budget.candidates": 1}
    folder = toys.run_here(make_config(tmp_path, changes), tmp_path / "results", display=display)
    warned = [line for line in display.lines if line.startswith("warning: ")]
    assert [line.split(" ")[1] for line in warned] == ["experts.b", "experts.c"]
    assert str(copy) in warned[0]
    assert str(models / "a") in warned[0]
    assert str(same) in warned[1]
    assert str(models / "base") in warned[1]
    scores = {row["label"]: row["score"] for row in toys.all_rows(folder, "finished") if row["stage"] == "baseline"}
    assert scores["a"] == scores["b"]
    assert scores["base"] == scores["c"]
