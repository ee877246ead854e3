"""Weights of FP8 with scales and of MXFP4 against what Transformers makes of them on a CPU."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file

from evolver.checkpoints.quantised import Scaled
from evolver.checkpoints.sources import open_base
from evolver.commands.evaluate import score_models
from evolver.errors import BadInput

BLOCK = 16
LINEAR = ("_proj.weight",)


def in_blocks(weight, block=BLOCK):
    """Codes of eight bits, and a float32 scale for each block of a weight."""
    rows, columns = (-(-n // block) for n in weight.shape)
    scales, codes = torch.zeros(rows, columns), torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def as_bytes(scales):
    """The nearest powers of two, as the bytes that stand for them."""
    return (scales.log2().round() + 127).to(torch.uint8)


SCALED = {
    "blocks": (in_blocks, "weight_scale_inv"),
    "one for all": (lambda w: in_blocks(w, 10_000), "weight_scale_inv"),
    "a scalar": (lambda w: (in_blocks(w, 10_000)[0], in_blocks(w, 10_000)[1].reshape(())), "weight_scale_inv"),
    "powers of two": (lambda w: (in_blocks(w)[0], as_bytes(in_blocks(w)[1])), "weight_scale_inv"),
    "eight-bit powers": (lambda w: (in_blocks(w)[0], in_blocks(w)[1].to(torch.float8_e8m0fnu)), "weight_scale_inv"),
    "another name": (in_blocks, "scale"),
}


def quantise(folder, form="blocks", dtype="bfloat16"):
    """Turn a model's folder into one of FP8 in its linear layers."""
    cut, name_of_scale = SCALED[form]
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(LINEAR)]:
        codes, scales = cut(tensors[name].float())
        tensors |= {name: codes, name.removesuffix("weight") + name_of_scale: scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    block = [BLOCK, BLOCK] if scales.numel() > 1 else None
    describe(folder, dtype, {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"})
    return folder


def describe(folder, dtype, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype, "quantization_config": settings}))


def loaded(folder):
    """What Transformers makes of a folder on this machine."""
    from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

    kind = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    from transformers.utils.quantization_config import Mxfp4Config

    given = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[kind](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=given).state_dict()


@pytest.mark.whole
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", SCALED)
def test_eight_bits_are_the_numbers_that_transformers_makes_of_them(models, tmp_path, form, dtype):
    folder = quantise(shutil.copytree(models / "a", tmp_path / "a"), form, dtype)
    base, wanted = open_base(str(folder)), loaded(folder)
    assert set(base.names()) == set(open_base(str(models / "a")).names())
    assert "quantization_config" not in base.config
    changed = 0
    for name in base.names():
        if name.endswith(LINEAR):
            assert base.tensor(name).dtype == base.headers[name].dtype == getattr(torch, dtype)
            changed += 1
        assert base.tensor(name).shape == base.headers[name].shape
        assert torch.equal(base.tensor(name).to(wanted[name].dtype), wanted[name]), name
    assert changed == 14


def gpt_oss(folder):
    """gpt-oss with experts as they are published: codes of four bits, and exponents."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(
            hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, vocab_size=64, num_local_experts=4, num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1,
        )
    ).bfloat16()  # fmt: skip
    model.save_pretrained(folder)
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = torch.randint(110, 128, codes.shape[:-1], dtype=torch.uint8, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    describe(folder, "bfloat16", {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return folder


@pytest.mark.whole
def test_four_bits_are_the_numbers_that_transformers_makes_of_them(tmp_path):
    folder = gpt_oss(tmp_path / "m")
    base, wanted = open_base(str(folder)), loaded(folder)
    assert set(base.names()) == set(wanted)
    for name, tensor in wanted.items():
        assert base.headers[name].shape == tensor.shape
        assert base.headers[name].dtype == base.tensor(name).dtype == tensor.dtype
        assert torch.equal(base.tensor(name), tensor), name
    assert float(base.tensor("model.layers.0.mlp.experts.down_proj").float().norm()) > 0


@pytest.mark.whole
def test_explain_says_what_scales_are(models, tmp_path):
    said = toys.evolver("explain", quantise(shutil.copytree(models / "a", tmp_path / "a"))).out.splitlines()
    read = dict(line.split(maxsplit=1) for line in said)
    assert read[f"{Q}.weight"] == f"{Q}.weight"
    assert read[f"{Q}.weight_scale_inv"] == f"(scales of {Q}.weight)"
    assert sum("scales of" in line for line in said) == 14


@pytest.mark.whole
def test_a_merge_of_quantised_and_plain_models_is_written_plainly(models, tmp_path):
    from transformers import AutoModelForCausalLM

    a = quantise(shutil.copytree(models / "a", tmp_path / "a"), dtype="float32")
    weights = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (a, models / "b")]
    (tmp_path / "m.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": weights, "dtype": "float32"}))
    ended = toys.evolver("merge", tmp_path / "m.yml", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    found, one, two = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), loaded(a), open_base(str(models / "b"))  # fmt: skip  # noqa: E501
    for name in two.names():
        wanted = (one[name].double() + two.tensor(name).double()) / 2
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7)


def run_over(models, make_config, place):
    """A run over these folders: its configuration, its folder, and what every candidate scored."""
    (place / "run").mkdir()
    changes = {"model.base": str(models["base"]), **{f"experts.{n}": str(models[n]) for n in "abc"}}
    config = make_config(place / "run", toys.SHORT | changes | {"model.compute": "float32"})
    folder = toys.run_here(config, place / "results")
    rows = toys.all_rows(folder, "finished")
    return config, folder, sorted((row["stage"], row["number"], row["score"]) for row in rows)


@pytest.mark.whole
def test_a_search_over_quantised_models_scores_their_plain_numbers(make_config, models, tmp_path):
    """The same run over the folders that Transformers saves of them."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    given = {"base": models / "base", **{n: models / n for n in "abc"}}
    folders = {kind: {} for kind in ("eight", "plain")}
    for name, folder in given.items():
        eight = quantise(shutil.copytree(folder, tmp_path / "eight" / name), dtype="float32")
        plain = shutil.copytree(folder, tmp_path / "plain" / name)
        model = AutoModelForCausalLM.from_pretrained(eight, quantization_config=FineGrainedFP8Config(dequantize=True))
        tensors = {n: t for n, t in model.state_dict().items() if n in load_file(folder / "model.safetensors")}
        save_file({n: t.contiguous() for n, t in tensors.items()}, plain / "model.safetensors", {"format": "pt"})
        folders["eight"][name], folders["plain"][name] = eight, plain
    found = {kind: run_over(of, make_config, tmp_path / kind) for kind, of in folders.items()}
    for _, folder, _ in found.values():
        assert "quantization_config" not in json.loads((folder / "best" / "config.json").read_text())
    assert found["eight"][2] == found["plain"][2]


def in_fours(weight):
    """Blocks of 24 rows and columns, which divide no weight of the toys."""
    return in_blocks(weight, 24)


@pytest.mark.whole
def test_a_search_over_models_that_their_blocks_do_not_divide(make_config, models, tmp_path, monkeypatch):
    """Against the same run over folders of float64 sums of codes and scales, rounded once."""
    monkeypatch.setitem(SCALED, "uneven", (in_fours, "weight_scale_inv"))
    monkeypatch.setattr(sys.modules[__name__], "BLOCK", 24)
    folders = {kind: {} for kind in ("eight", "plain")}
    for name in ("base", *"abc"):
        eight = quantise(shutil.copytree(models / name, tmp_path / "eight" / name), "uneven", "float32")
        plain, tensors = (
            shutil.copytree(models / name, tmp_path / "plain" / name),
            load_file(eight / "model.safetensors"),
        )
        for scale in [n for n in tensors if n.endswith("_scale_inv")]:
            factors, codes = tensors.pop(scale).double(), tensors[weight := scale.removesuffix("_scale_inv")]
            rows, columns = (torch.arange(n) // 24 for n in codes.shape)
            tensors[weight] = (codes.double() * factors[rows][:, columns]).float()
        save_file(tensors, plain / "model.safetensors", {"format": "pt"})
        folders["eight"][name], folders["plain"][name] = eight, plain
    scores = {}
    for kind, of in folders.items():
        config, _, scores[kind] = run_over(of, make_config, tmp_path / kind)
        scores[kind] += [one.score for one in score_models(str(config), [str(of["a"])], "dev")]
    assert scores["eight"] == scores["plain"]
    with pytest.raises(RuntimeError):  # else no other way of reading is needed
        loaded(folders["eight"]["a"])


def stored(tmp_path, tensors, settings, dtype="bfloat16"):
    folder = tmp_path / "m"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    describe(folder, dtype, settings)
    return folder


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
Q = "model.layers.0.self_attn.q_proj"


def test_a_weight_that_its_blocks_do_not_divide(tmp_path):
    """As the 576 rows of DeepSeek-V3 under blocks of 128, which Transformers itself refuses: the last one is short."""
    weight = torch.randn(40, 56)
    codes, scales = in_blocks(weight)
    base = open_base(str(stored(tmp_path, {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": scales}, FP8, "float32")))
    assert scales.shape == (3, 4)
    assert base.names() == [f"{Q}.weight"]
    error = (base.tensor(f"{Q}.weight") - weight).abs()
    assert bool((error <= weight.abs() / 16 + scales.max() / 512).all())  # three bits of fraction, or the least number


def test_scales_of_activations_are_no_weights(tmp_path):
    codes, scales = in_blocks(torch.randn(16, 16))
    more = {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": scales, f"{Q}.activation_scale": torch.ones(())}
    assert open_base(str(stored(tmp_path, more, FP8))).names() == [f"{Q}.weight"]


def test_a_digest_is_of_codes_and_scales(tmp_path):
    codes, scales = in_blocks(torch.randn(16, 32))
    found = set()
    for number, (one, two) in enumerate(((codes, scales), (codes, 2 * scales), (codes.roll(1), scales))):
        (tmp_path / str(number)).mkdir()
        tensors = {f"{Q}.weight": one, f"{Q}.weight_scale_inv": two}
        found.add(open_base(str(stored(tmp_path / str(number), tensors, FP8))).digest())
    assert len(found) == 3


def test_scales_that_are_not_finite_are_refused(tmp_path):
    codes, scales = in_blocks(torch.randn(16, 32))
    scales[0, 1] = float("nan")
    base = open_base(str(stored(tmp_path, {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": scales}, FP8)))
    with pytest.raises(BadInput, match=f"tensor {Q}.weight of .* holds NaN or infinite"):
        base.digest()


X = "model.layers.0.mlp.experts.down_proj"
BLOCKS = torch.zeros(2, 8, 1, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "settings", "says"),
    [
        ({f"{Q}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}, FP8, "has dtype F8_E4M3"),
        ({f"{Q}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn), f"{Q}.weight_scale_inv": torch.ones(3, 2)}, FP8,
         r"weight_scale_inv of shape \(3, 2\) does not fit"),
        ({f"{X}_blocks": BLOCKS}, {"quant_method": "mxfp4"}, "without its scales"),
        ({f"{X}_blocks": BLOCKS, f"{X}_scales": torch.ones(2, 7, 1, dtype=torch.uint8)}, {"quant_method": "mxfp4"},
         r"_scales of shape \(2, 7, 1\) does not fit"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(tmp_path, tensors, settings, says):
    folder = stored(tmp_path, tensors, settings)
    with pytest.raises(BadInput, match=rf"^model\.base: .*{says}"):
        _ = open_base(str(folder)).headers


def test_a_code_of_four_bits_is_one_of_sixteen_numbers():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 1, 16)
    powers = torch.full((1, 1, 1), 128, dtype=torch.uint8)
    read = {"x_blocks": codes, "x_scales": powers}.__getitem__
    found = Scaled("x_blocks", "x_scales", (1, 32, 1), torch.float32).plain(read).flatten()
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found[::2].tolist() == [2 * s for s in sizes] + [-2 * s for s in sizes]
    assert not found[1::2].any()  # the higher half of each byte
