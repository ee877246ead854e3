"""Adapters of all kinds against what PEFT itself makes of them (merge_and_unload)."""

import json
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.peft_layers import LayerAdapter
from evolver.checkpoints.sources import open_base, open_expert
from evolver.errors import BadInput

CLOSE = 1e-6


def llama(tied=True, biases=False, **more):
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=40, tie_word_embeddings=tied, attention_bias=biases, **more,
        )
    )  # fmt: skip


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def train(folder, model, seed=3, kind="LoraConfig", **settings):
    """Save the model as base and a random adapter of it; every trained parameter is moved. The tuned model."""
    model.save_pretrained(folder / "base")
    usual = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} if kind == "LoraConfig" else {}
    tuned = get_peft_model(model, getattr(peft, kind)(**usual | settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    tuned.save_pretrained(folder / "lora")
    return tuned


def opened(folder):
    base = open_base(str(folder / "base"))
    return base, open_expert(str(folder / "lora"), base, "experts.x")


def with_biases(model):
    """Biases that are not zero, as they are when a model is made."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn_like(parameter)
    return model


LINEAR = ["q_proj", "v_proj", "down_proj"]
# A model, the adapter's settings, and how many tensors of the base it changes.
CASES = {
    "plain": (llama, {"target_modules": LINEAR}, 6),
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True}, 6),
    "patterns": (llama, {"target_modules": LINEAR, "rank_pattern": {"v_proj": 2},
                         "alpha_pattern": {"down_proj": 9}}, 6),
    "anchored patterns": (llama, {"target_modules": LINEAR, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 1},
                                  "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 7}}, 6),
    "rslora with patterns": (llama, {"target_modules": LINEAR, "rank_pattern": {"q_proj": 5}, "use_rslora": True}, 6),
    "transposed layers": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
    "square transposed layers": (gpt2, {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}, 2),
    "biases of transposed layers": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}, 15),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}, 3),
    "embedding and head": (lambda: llama(tied=False), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 4),
    "embedding of transposed layers": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}, 3),
    "modules to save": (lambda: llama(tied=False), {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}, 9),
    "modules to save, tied": (llama, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 3),
    "all biases": (lambda: llama(biases=True), {"bias": "all"}, 10),
    "biases of LoRA layers": (lambda: llama(biases=True), {"bias": "lora_only",
                                                            "target_modules": ["q_proj", "o_proj"]}, 8),
    "an innocent beginning": (llama, {"init_lora_weights": "gaussian"}, 2),
}  # fmt: skip


IN = {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}
# What is no low-rank delta, in the same form; the second settings are of a class of PEFT.
BY_PEFT = {
    "DoRA": (llama, {"target_modules": LINEAR, "use_dora": True}, 6),
    "DoRA with patterns": (llama, {"target_modules": LINEAR, "use_dora": True, "use_rslora": True,
                                   "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 9}}, 6),
    "DoRA of transposed layers": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True,
                                         "fan_in_fan_out": True}, 6),
    "DoRA of embedding and head": (lambda: llama(tied=False), {"target_modules": ["embed_tokens", "lm_head", "q_proj"],
                                                               "use_dora": True}, 4),
    "DoRA of an embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, 3),
    "DoRA and modules to save": (lambda: llama(tied=False), {"use_dora": True, "modules_to_save": ["norm"]}, 7),
    "DoRA and biases": (lambda: llama(biases=True), {"use_dora": True, "bias": "all"}, 10),
    "LoHa": (llama, {"kind": "LoHaConfig", "r": 3, "alpha": 5, "target_modules": LINEAR}, 6),
    "LoHa with patterns": (llama, {"kind": "LoHaConfig", "r": 3, "alpha": 5, "target_modules": LINEAR,
                                   "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 9}}, 6),
    "LoKr": (llama, {"kind": "LoKrConfig", "r": 2, "alpha": 5, "target_modules": LINEAR}, 6),
    "LoKr in four parts": (llama, {"kind": "LoKrConfig", "r": 1, "alpha": 5, "target_modules": r".*_proj",
                                   "decompose_both": True, "decompose_factor": 4}, 14),
    "IA3": (llama, {"kind": "IA3Config", **IN}, 6),
    "IA3 and biases": (lambda: with_biases(llama(biases=True)), {"kind": "IA3Config", **IN}, 10),
    "IA3 of transposed layers": (lambda: with_biases(gpt2()), {
        "kind": "IA3Config", "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"],
        "fan_in_fan_out": True}, 6),
    "AdaLoRA": (llama, {"kind": "AdaLoraConfig", "init_r": 4, "lora_alpha": 5, "total_step": 9,
                        "target_modules": LINEAR}, 6),
    "AdaLoRA of transposed layers": (gpt2, {"kind": "AdaLoraConfig", "init_r": 4, "total_step": 9, "lora_alpha": 5,
                                            "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 6),
    "OFT": (llama, {"kind": "OFTConfig", "oft_block_size": 8, "target_modules": LINEAR}, 6),
    "OFT in a number of blocks": (llama, {"kind": "OFTConfig", "oft_block_size": 0, "r": 4, "target_modules": LINEAR,
                                          "use_cayley_neumann": False}, 6),
    "OFT, constrained and shared": (lambda: with_biases(llama(biases=True)), {
        "kind": "OFTConfig", "oft_block_size": 4, "target_modules": LINEAR, "coft": True, "eps": 1e-3,
        "block_share": True, "bias": "oft_only"}, 10),
    "BOFT": (llama, {"kind": "BOFTConfig", "boft_block_size": 4, "target_modules": LINEAR}, 6),
    "BOFT in factors": (llama, {"kind": "BOFTConfig", "boft_block_num": 4, "boft_block_size": 0,
                                "boft_n_butterfly_factor": 2, "target_modules": ["q_proj", "v_proj"]}, 4),
    "VeRA": (llama, {"kind": "VeraConfig", "r": 5, "target_modules": LINEAR}, 6),
    "VeRA, drawn anew": (llama, {"kind": "VeraConfig", "r": 5, "target_modules": LINEAR, "save_projection": False,
                                 "projection_prng_key": 11}, 6),
    "VeRA of transposed layers": (gpt2, {"kind": "VeraConfig", "r": 5, "target_modules": ["c_attn", "mlp.c_proj"],
                                         "fan_in_fan_out": True}, 4),
    "biases of LoRA": (lambda: with_biases(llama(biases=True)), {"target_modules": ["q_proj", "o_proj"],
                                                                  "lora_bias": True}, 8),
}  # fmt: skip
# One of each kind.
KINDS = ["DoRA", "LoHa", "LoKr", "IA3", "AdaLoRA", "OFT", "BOFT", "VeRA", "biases of LoRA"]


@pytest.mark.parametrize("name", CASES | BY_PEFT)
def test_an_adapter_is_what_peft_makes_of_it(tmp_path, name):
    make, settings, changes = (CASES | BY_PEFT)[name]
    torch.manual_seed(0)
    merged = train(tmp_path, make(), **settings).merge_and_unload().state_dict()
    base, ours = opened(tmp_path)
    assert ours.names() == base.names()
    changed = 0
    for tensor in base.names():
        assert ours.tensor(tensor).shape == merged[tensor].shape
        assert (ours.tensor(tensor) - merged[tensor]).abs().max() <= CLOSE, tensor
        if name in BY_PEFT:  # the same computation
            assert torch.equal(ours.tensor(tensor), merged[tensor]), tensor
        changed += not torch.equal(ours.tensor(tensor), base.tensor(tensor))
    assert changed == changes


def test_an_adapter_whose_ranks_were_cut_off_in_training(tmp_path):
    """AdaLoRA saves what is left of its matrices, and says in its configuration which ranks these were."""
    torch.manual_seed(0)
    tuned = train(tmp_path, llama(), **BY_PEFT["AdaLoRA"][1])
    left = iter([[True, False, True, True], [False, True, False, False], [True] * 4] * 2)
    layers = sorted(n.removesuffix(".default") for n, _ in tuned.base_model.model.named_parameters() if "lora_E" in n)
    tuned.peft_config["default"].rank_pattern = {name: next(left) for name in layers}
    tuned.save_pretrained(tmp_path / "lora")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    wanted = peft.PeftModel.from_pretrained(whole, tmp_path / "lora").merge_and_unload().state_dict()
    base, ours = opened(tmp_path)
    assert sum(not torch.equal(ours.tensor(n), base.tensor(n)) for n in base.names()) == 6
    for name in base.names():
        assert torch.equal(ours.tensor(name), wanted[name]), name


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("OFT", {"oft_block_size": None}, "before 0.14, which computed rotations in another way"),
        ("OFT", {"peft_version": "0.17.1"}, "before 0.18, which computed rotations in another way"),
        ("VeRA", {"save_projection": "no"}, "save_projection: 'no' is not usable"),
        (
            "AdaLoRA",
            {"rank_pattern": {"q_proj": 3}},
            "rank_pattern: .* is not usable; it has to be a mapping from names",
        ),
    ],
)
def test_a_kind_that_cannot_be_read_as_it_was_meant_is_refused(tmp_path, name, settings, says):
    train(tmp_path, llama(), **BY_PEFT[name][1])
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(BadInput, match=rf"^experts\.x: .*{says}"):
        opened(tmp_path)


def test_a_bias_that_no_merged_model_can_hold_is_refused(tmp_path):
    train(tmp_path, llama(), lora_bias=True)
    with pytest.raises(BadInput, match=r"^experts\.x: .* trains a bias for .*q_proj \(lora_bias\), where the model"):
        opened(tmp_path)


def test_a_square_layer_follows_the_others_where_the_flag_is_that_of_the_head(tmp_path):
    """PEFT writes down the orientation of the layer that it met last: here the head, the one plain layer of GPT-2."""
    torch.manual_seed(0)
    model = gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    tuned = train(tmp_path, model, target_modules=["c_attn", "c_proj", "lm_head"], fan_in_fan_out=True)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    merged = tuned.merge_and_unload().state_dict()
    base, ours = opened(tmp_path)
    assert "lm_head.weight" in base.names()
    for name in base.names():
        assert (ours.tensor(name) - merged[name]).abs().max() <= CLOSE, name


def test_bfloat16_is_rounded_once(tmp_path):
    """As PEFT does with a float32 adapter: within half a unit in the last place of the float32 result."""
    torch.manual_seed(0)
    model = llama().bfloat16()
    tuned = train(tmp_path, model, target_modules=LINEAR)
    exact = train(tmp_path / "wide", model_in_float32(tmp_path / "base"), target_modules=LINEAR)
    copy_adapter(tuned, exact)
    wanted, theirs = exact.merge_and_unload().state_dict(), tuned.merge_and_unload().state_dict()
    base, ours = opened(tmp_path)
    worst = 0.0
    for name in base.names():
        assert ours.tensor(name).dtype == torch.bfloat16
        _, exponent = torch.frexp(wanted[name])
        half_unit = 2.0 ** (exponent - 9)  # of 8 significant bits
        worst = max(worst, float(((ours.tensor(name).float() - wanted[name]).abs() / half_unit).max()))
        assert torch.equal(ours.tensor(name), theirs[name]), name
    assert 0.9 < worst <= 1.001


def model_in_float32(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def copy_adapter(source, target):
    own = target.state_dict()
    with torch.no_grad():
        for name, tensor in source.state_dict().items():
            if "lora_" in name:
                own[name].copy_(tensor)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "FOURIERFT"}, r"of the kind 'FOURIERFT' \(peft_type\), and only LORA, LOHA, LOKR, IA3, ADALORA"),
        ({"peft_type": None}, r"of the kind None \(peft_type\)"),
        ({"r": 5}, "says r = 5 for .*, and its matrices there have the rank"),
        ({"r": "8"}, "r: '8' is not usable; it has to be an integer from 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan is not usable; it has to be a number"),
        ({"lora_alpha": [16]}, r"lora_alpha: \[16\] is not usable"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' is not usable; it has to be true or false"),
        ({"rank_pattern": []}, r"rank_pattern: \[\] is not usable; it has to be a mapping"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: .* is not usable; it has to be a mapping"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"target_modules": 7}, "target_modules: 7 is not usable"),
        ({"target_modules": ["nowhere"]}, "holds matrices for .*, which target_modules in .* does not name"),
    ],
)
def test_an_adapter_is_held_against_its_configuration(tmp_path, settings, says):
    train(tmp_path, llama())
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(BadInput, match=rf"^experts\.x: .*{says}"):
        opened(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_moved_its_base_is_refused(tmp_path, start):
    """Their beginning takes the largest components out of the base: what was saved does not belong to the base."""
    train(tmp_path, llama(), init_lora_weights=start)
    with pytest.raises(BadInput, match=f"uses {start}, .*merge_and_unload"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("module", "says"), [("embed_tokens", "without the head"), ("lm_head", "nor a tensor of the base")]
)
def test_half_of_a_tied_pair_cannot_be_trained_apart(tmp_path, module, says):
    train(tmp_path, llama(), modules_to_save=[module])
    with pytest.raises(BadInput, match=says):
        opened(tmp_path)


def test_whole_tensors_count_in_the_digest(tmp_path):
    for seed, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        torch.manual_seed(0)
        train(folder, llama(tied=False), modules_to_save=["norm"])
        if seed:
            change_norm(folder / "lora" / "adapter_model.safetensors")
    (base, one), (_, two) = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert len({base.digest(), one.digest(), two.digest()}) == 3


def change_norm(file):
    from safetensors.torch import load_file, save_file

    content = load_file(file)
    content["base_model.model.model.norm.weight"][0] += 1
    save_file(content, file)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_that_peft_reads_is_known_by_what_it_makes(tmp_path, name):
    """Other values or settings are another model; a note or a dropout in its configuration is not."""
    make, settings, _ = BY_PEFT[name]
    found = set()
    for folder, seed in (("one", 3), ("two", 4)):
        torch.manual_seed(0)
        train(tmp_path / folder, make(), seed=seed, **settings)
        found.add(opened(tmp_path / folder)[1].digest())
    file = tmp_path / "two" / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"note": 1, "lora_dropout": 0.3}))
    found.add(opened(tmp_path / "two")[1].digest())
    assert len(found) == 2
    changes = {"LoHa": {"alpha": 2}, "LoKr": {"alpha": 2}, "OFT": {"eps": 1e-3}, "IA3": {}, "BOFT": {}, "VeRA": {}}
    if change := changes.get(name, {"lora_alpha": 2}):
        file.write_text(json.dumps(config | change))
        assert opened(tmp_path / "two")[1].digest() not in found


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_computed_in_float32(tmp_path, name):
    make, settings, _ = BY_PEFT[name]
    torch.manual_seed(0)
    exact = train(tmp_path / "wide", make().bfloat16().float(), **settings).merge_and_unload().state_dict()
    torch.manual_seed(0)
    make().bfloat16().save_pretrained(tmp_path / "base")
    (tmp_path / "wide" / "lora").rename(tmp_path / "lora")
    base, ours = opened(tmp_path)
    for tensor in base.names():
        assert ours.tensor(tensor).dtype == torch.bfloat16
        assert torch.equal(ours.tensor(tensor), exact[tensor].bfloat16()), tensor


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("damage", "says"), [("shape", "PEFT cannot put the adapter"), ("missing", "only one of the two has")]
)
def test_what_peft_cannot_put_onto_the_base_is_refused(tmp_path, name, damage, says):
    from safetensors.torch import load_file, save_file

    make, settings, _ = BY_PEFT[name]
    train(tmp_path, make(), **settings)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    content = load_file(file)
    last = max(content)
    if damage == "shape":
        content[last] = torch.cat([content[last], content[last]])
    elif name in ("IA3", "OFT"):
        pytest.skip("it has one tensor for each layer; without it, the layer is not changed")
    else:
        del content[last]
    save_file(content, file)
    with pytest.raises(BadInput, match=rf"^experts\.x: .*{says}") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_reading_an_adapter_draws_no_random_numbers(tmp_path):
    train(tmp_path, llama(), **BY_PEFT["DoRA"][1])
    before = torch.get_rng_state()
    _, ours = opened(tmp_path)
    ours.tensor("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(torch.get_rng_state(), before)


def test_several_threads_read_adapters_at_once(tmp_path):
    """PEFT makes layers without values by changing how the whole process makes modules."""
    models = []
    for name in ("DoRA", "LoHa", "VeRA"):
        train(tmp_path / name, llama(), **BY_PEFT[name][1])
        models.append(opened(tmp_path / name)[1])
    wanted = [(model, name) for _ in range(3) for name in models[0].names() for model in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: Adapter.tensor(*pair), wanted))
    for (model, name), tensor in zip(wanted, found, strict=True):
        assert torch.equal(tensor, Adapter.tensor(model, name)), name


def test_without_peft_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    train(tmp_path, llama(), **BY_PEFT["DoRA"][1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"run pip install 'evolver\[experts\]'"):
        opened(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapters"


def asked_thrice(ours):
    """The tensors at the first, second and third time."""
    return [{name: ours.tensor(name).clone() for name in ours.names()} for _ in range(3)]


@pytest.mark.parametrize("name", BY_PEFT)
def test_what_is_asked_for_again_is_computed_once_and_the_same(tmp_path, name, cache, monkeypatch):
    make, settings, _ = BY_PEFT[name]
    torch.manual_seed(0)
    train(tmp_path, make(), **settings)
    base, ours = opened(tmp_path)
    first, *others = asked_thrice(ours)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(LayerAdapter, "_changed", lambda *_: pytest.fail("computed again"))
    _, anew = opened(tmp_path)
    anew._asked.update(base.names())
    for made in (*others, {n: ours.tensor(n) for n in base.names()}, {n: anew.tensor(n) for n in base.names()}):
        assert all(torch.equal(made[n], first[n]) and made[n].dtype == first[n].dtype for n in base.names())


def test_another_adapter_has_other_tensors_in_the_cache(tmp_path, cache):
    for seed, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        torch.manual_seed(0)
        train(folder, llama(), seed=seed, **BY_PEFT["LoHa"][1])
        asked_thrice(opened(folder)[1])
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("trouble", ["a file in the place of the folder", "damage"])
def test_a_cache_that_cannot_be_used_costs_time_only(tmp_path, cache, trouble):
    train(tmp_path, llama(), **BY_PEFT["LoKr"][1])
    if trouble == "damage":
        asked_thrice(opened(tmp_path)[1])
        (file,) = cache.rglob("*.safetensors")
        file.write_bytes(file.read_bytes()[:50])
    else:
        cache.parent.mkdir(parents=True)
        cache.write_text("")
    first, second, third = asked_thrice(opened(tmp_path)[1])
    assert all(torch.equal(first[n], other[n]) for other in (second, third) for n in first)


@pytest.mark.parametrize("kind", ["DoRA", "IA3"])
def test_an_adapter_of_a_classifier_on_a_bare_body(tmp_path, kind):
    """The adapter names tensors as the classifier does, the base as the body alone; the head stays with the adapter."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

    from evolver.checkpoints.agreement import Agreement
    from evolver.checkpoints.heads import head_of
    from evolver.evaluation.blueprint import without_weights

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = with_biases(BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes)))
    settings = {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"]}
    more = {"use_dora": True} if kind == "DoRA" else {"kind": "IA3Config", "feedforward_modules": ["output.dense"]}
    merged = train(tmp_path, model, **settings, **more).merge_and_unload()
    BertModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "bare")
    base = open_base(str(tmp_path / "bare"), headless=True)
    names = Agreement(
        base, lambda m: without_weights(m.path, m.config, AutoModelForSequenceClassification), apart=True
    )  # fmt: skip
    ours = open_expert(str(tmp_path / "lora"), base, "experts.x", names=names)
    wanted = merged.bert.state_dict()
    changed = 0
    for name in base.names():
        found = wanted[name.removeprefix("bert.")]
        assert torch.equal(ours.tensor(name), found), name
        changed += not torch.equal(found, base.tensor(name))
    assert changed == (6 if kind == "DoRA" else 8)
    assert torch.equal(head_of(ours, base)["classifier.weight"], merged.classifier.weight)
