"""Mixtures of experts as they are published, one tensor for each expert: live, evaluated, searched over, exported."""

from __future__ import annotations

import json
import warnings
import weakref

import pytest
import torch
import toys
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toys import evolver, refusal, rows, run_here
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import Checkpoint
from evolver.config.model import ModelSettings
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.fused import slices_of
from evolver.evaluation.items import item_hash
from evolver.evaluation.live import LiveModel
from evolver.records import Candidate
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": toys.LENGTH,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
MADE = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen2": (
        Qwen2MoeForCausalLM, Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    # More than ten experts: the names of the tenth and the second are not in the order of the alphabet.
    "qwen3": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 12, "moe_intermediate_size": 16, "head_dim": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "deepseek": (
        DeepseekV3ForCausalLM, DeepseekV3Config, {**LATENT, "n_routed_experts": 4, "moe_intermediate_size": 16},
    ),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
}  # fmt: skip
FIRST_EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w1.weight",
    "gpt-oss": "model.layers.1.mlp.experts.gate_up_proj",  # its files hold the experts of a layer in one tensor
}
ROUTER = {"mixtral": ".block_sparse_moe.gate.", "gpt-oss": ".mlp.router."}


@pytest.fixture(scope="module", params=MADE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def experts(family, tmp_path_factory):
    """A folder with a tiny model ``base``, saved by its class, and two noisy fine-tunes of it."""
    folder, words = tmp_path_factory.mktemp(family), toys.tokenizer()
    kind, config, more = MADE[family]
    torch.manual_seed(0)
    toys.noisy_experts(kind(config(vocab_size=len(words), **(SIZES | more))), folder, words)
    return folder


@pytest.fixture(scope="module")
def configured(experts, tasks, tmp_path_factory):
    def make(**changes):
        entries = [{"task": "toy", "metric": "acc", "dev": 40, "report": 20}]
        raw = toys.settings(experts, tasks, {"evaluation.tasks": entries, "run": "mixture", **changes})
        raw["experts"] = {n: str(experts / n) for n in ("a", "b")}
        file = tmp_path_factory.mktemp("mixture") / "run.yaml"
        file.write_text(yaml.safe_dump(raw))
        return file

    return make


def stored(folder):
    return load_file(folder / "model.safetensors")


def shapes_of(folder):
    return {name: info.shape for name, info in Checkpoint(folder, "model.base").headers.items()}


def live_of(folder, compute="float32"):
    return LiveModel(ModelSettings(base=str(folder), compute=compute), folder, shapes_of(folder), "cpu")


def loaded(folder, dtype=torch.float32):
    """The tensors that Transformers makes of a folder, of which it must miss none and understand all."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.state_dict()


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def accuracy(folder, tasks, indices):
    """What lm-eval says of each item."""
    lm = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    out = simple_evaluate(lm, tasks=["toy"], task_manager=manager, samples={"toy": indices}, bootstrap_iters=0)
    return {item_hash(s["doc"]): s["acc"] for s in out["samples"]["toy"]}


def test_the_layout_is_the_published_one(family, experts):
    assert FIRST_EXPERT.get(family, "model.layers.1.mlp.experts.0.gate_proj.weight") in stored(experts / "base")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_live_weights_are_those_that_transformers_loads(experts, compute):
    """In whatever order the tensors come, and with nothing left of the model that was there before."""
    live, dtype = live_of(experts / "base", compute), getattr(torch, compute)
    for name, order in (("a", reversed), ("b", sorted), ("base", sorted)):
        live.write((n, t) for n, t in order(list(stored(experts / name).items())))
        same(live.module.state_dict(), loaded(experts / name, dtype))


def test_one_stored_tensor_is_in_memory_at_a_time(experts):
    live, alive, most = live_of(experts / "base"), weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for name, shape in shapes_of(experts / "base").items():
            tensor = torch.ones(shape)
            alive.add(tensor)
            yield name, tensor
            del tensor
            most = max(most, len(alive))

    live.write(stream())
    assert most <= 1
    assert all(bool((t == 1).all()) for t in live.module.state_dict().values())


def test_a_tensor_that_is_left_out_or_comes_twice_is_noticed(experts):
    live, tensors = live_of(experts / "base"), list(stored(experts / "a").items())
    experts_of_layers = [n for n, _ in tensors if ".experts." in n]
    with pytest.raises(ValueError, match="are missing"):
        live.write((n, t) for n, t in tensors if n != experts_of_layers[-1])
    with pytest.raises(ValueError, match="gives it twice"):
        live.write([*tensors, (experts_of_layers[0], tensors[0][1])])
    live.write(tensors)
    same(live.module.state_dict(), loaded(experts / "a"))


def test_scores_are_those_of_lm_eval(experts, configured, tasks):
    ready = prepare(config_at(configured()))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.status == "ok", result.reason
    dev = ready.tasks.items.dev
    theirs = accuracy(experts / "a", tasks, sorted(i.index for i in dev))
    assert list(result.items) == [theirs[item.hash] for item in dev]
    assert 0 < sum(result.items) < len(dev)


def test_evaluate_scores_a_published_folder(experts, configured, tasks):
    file = configured()
    ready = prepare(config_at(file))
    theirs = accuracy(experts / "b", tasks, sorted(i.index for i in ready.tasks.items.dev))
    ended = evolver("evaluate", file, experts / "b", "--dev")
    assert ended.code == 0, ended.err
    row = next(line for line in ended.out.splitlines() if str(experts / "b") in line)
    assert f"{100 * sum(theirs.values()) / len(theirs):.1f}" in row


def test_a_whole_search_leaves_a_model_in_the_layout_of_the_base(experts, configured, tmp_path):
    folder = run_here(configured(**{"search": {"algorithm": "tpe"}, "budget.candidates": 3}), tmp_path / "results")
    assert not [r["reason"] for r in rows(folder).values() if r["status"] != "ok"]
    assert stored(folder / "best").keys() == stored(experts / "base").keys()
    loaded(folder / "best")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}


@pytest.mark.parametrize("family", ["mixtral", "qwen3"], indirect=True)
def test_an_exported_adapter_is_what_peft_makes_of_it(experts, configured, tmp_path):
    """PEFT puts the matrices of single experts together as Transformers does with the weights."""
    changes = {"search": {"algorithm": "tpe"}, "budget.candidates": 2, "baselines.masses": [1.0]}
    folder = run_here(configured(**changes), tmp_path / "results")
    ended = evolver("export", folder, tmp_path / "adapter", "--lora", 2)
    assert ended.code == 0, ended.err
    base = open_base(str(experts / "base"))
    adapter, live = open_expert(str(tmp_path / "adapter"), base, "experts.x"), live_of(experts / "base")
    live.write((n, adapter.tensor(n)) for n in base.names())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(experts / "base"), tmp_path / "adapter")
    found = theirs.merge_and_unload().state_dict()
    found = {n.replace("modules_to_save.default.", ""): t for n, t in found.items() if "original_module" not in n}
    for name, tensor in live.module.state_dict().items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)


def test_a_merge_is_that_of_the_loaded_models(experts, tmp_path):
    models = [{"model": str(experts / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    ended = evolver("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ended.code == 0, ended.err
    ours, a, b = (loaded(f) for f in (tmp_path / "out", experts / "a", experts / "b"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), (a[name].double() + b[name].double()) / 2, rtol=1e-6, atol=1e-7)


def test_a_filter_finds_the_routers(family, experts, tmp_path):
    part = ROUTER.get(family, ".mlp.gate.")
    weight = [{"filter": part, "value": 0.0}, {"value": 0.5}]
    models = [{"model": str(experts / n), "parameters": {"weight": weight}} for n in ("a", "b")]
    raw = {"merge_method": "task_arithmetic", "base_model": str(experts / "base"), "models": models}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(raw))
    ended = evolver("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ended.code == 0, ended.err
    merged, base = stored(tmp_path / "out"), stored(experts / "base")
    kept = {name for name, tensor in merged.items() if torch.equal(tensor, base[name])}
    assert kept == {name for name in base if part in name}
    assert kept


def test_statistics_are_refused(configured, tmp_path):
    file = configured(search={"algorithm": "tpe", "method": "regmean"})
    ended = evolver("run", file, "--results", tmp_path / "results")
    assert "the inputs of each cannot be collected" in refusal(ended.code, ended.err)
    assert not (tmp_path / "results").exists()
    assert refusal(*(lambda e: (e.code, e.err))(evolver("validate", file))) == refusal(ended.code, ended.err)


@pytest.fixture
def changed(configured, experts, tmp_path):
    """``changed(config, tensors)``: what ``validate`` says after changes to the base, in one sentence."""

    def make(config=None, tensors=lambda found: found):
        folder = tmp_path / "base"
        folder.mkdir()
        for file in (experts / "base").iterdir():
            if file.suffix == ".json" or file.suffix == ".jinja":
                (folder / file.name).write_bytes(file.read_bytes())
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | (config or {})))
        save_file(tensors(stored(experts / "base")), folder / "model.safetensors", metadata={"format": "pt"})
        raw = yaml.safe_load(configured().read_text())
        raw["model"]["base"], raw["experts"] = str(folder), {n: str(folder) for n in ("a", "b")}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        ended = evolver("validate", tmp_path / "run.yaml")
        return refusal(ended.code, ended.err)

    return make


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "deepseek"], indirect=True)
def test_a_base_that_lacks_a_tensor_of_an_expert_is_refused(family, changed):
    said = changed(tensors=lambda found: {n: t for n, t in found.items() if ".1." not in n or ".experts.1." not in n})
    held, wanted = {"mixtral": (6, 8), "qwen3": (11, 12), "deepseek": (3, 4)}[family]  # of the first that is met
    assert f"holds {held} tensors for model.layers." in said
    assert f"by its config.json there are {wanted};" in said


@pytest.mark.parametrize("family", ["mixtral"], indirect=True)
def test_a_configuration_with_another_number_of_experts_is_refused(changed):
    said = changed({"num_local_experts": 6})
    assert "holds 8 tensors for model.layers.0.mlp.experts.gate_up_proj, and by its config.json there are 12;" in said


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("size", [12, 20])
def test_a_configuration_with_experts_of_another_size_is_refused(changed, size):
    said = changed({"moe_intermediate_size": size})
    assert "copy" in said
    assert "config.json" in said


@pytest.mark.parametrize("family", ["olmoe"], indirect=True)
def test_an_expert_that_is_no_matrix_is_refused(changed):
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert name in changed(tensors=lambda found: found | {name: torch.ones(())})


def test_tensors_that_are_put_behind_each_other(tmp_path):
    """Not only experts: a convolution over queries, keys and values, in equal parts as Transformers saves it, and in
    those of the published models, whose values are wider.
    """
    words = toys.tokenizer()
    config = OlmoHybridConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    toys.noisy_experts(OlmoHybridForCausalLM(config), tmp_path)
    names = [f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"]
    for sizes in ((32, 32, 32), (24, 24, 48)):
        for folder in (tmp_path / "base", tmp_path / "a"):
            tensors = stored(folder)
            cut = torch.cat([tensors[n] for n in names]).split(sizes)
            tensors |= {n: t.clone() for n, t in zip(names, cut, strict=True)}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        live = live_of(tmp_path / "base")
        live.write(stored(tmp_path / "a").items())
        same(live.module.state_dict(), loaded(tmp_path / "a"))
    del tensors[names[1]]
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"holds 2 tensors for .*, which do not fill the shape"):
        slices_of(live.module, shapes_of(tmp_path / "a"), tmp_path / "a")


def test_a_conversion_that_no_slice_can_stand_for_is_refused(tmp_path):
    config = HrmTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_layers_per_stack=1,
    )  # fmt: skip
    HrmTextForCausalLM(config).save_pretrained(tmp_path)
    toys.refused(lambda: live_of(tmp_path), "as it loads it (Chunk)", tmp_path)
