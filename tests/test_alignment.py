"""Hidden units in another order: found again exactly, and nothing that a model computes depends on it."""

import json
from itertools import permutations, product

import families
import numpy as np
import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file
from scipy.optimize import linprog
from toys import refused

from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import TensorInfo
from evolver.config.model import AlignmentSettings, ModelSettings
from evolver.merging.alignment import orders as module
from evolver.merging.alignment.layouts import LAYOUTS, unit_layers
from evolver.merging.alignment.matching import Heads, best_order, head_order, unit_order
from evolver.merging.alignment.orders import STREAM, all_axes, find_orders, mean_cosine, ordered, put_in_order
from evolver.merging.alignment.realigned import Realigned
from evolver.merging.alignment.semantics import semantic_map, token_head
from evolver.merging.alignment.transport import exact_order, sinkhorn, soft_transport, unit_costs, unit_masses

ALWAYS = AlignmentSettings(parts="both", when="always")
ALL = AlignmentSettings(parts="all", when="always")
# Families whose units are known; of these, the stream of ELECTRA, whose embeddings are narrower, is not.
KNOWN = {
    "Llama 2", "Llama 3", "SmolLM", "Mistral", "Qwen2, Qwen2.5", "Qwen3", "Gemma 2", "Gemma 3, text", "OLMo", "BERT",
    "RoBERTa", "XLM-R", "ELECTRA", "DistilBERT",
}  # fmt: skip
FEW = {"Mistral", "Qwen2, Qwen2.5", "Qwen3", "BERT", "DistilBERT", "GPT-2", "Mixtral", "OLMo 2"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scrambled(tensors, layers, seed=1):
    """A model's tensors with the units of all its layers in a random order, made by reshaping."""
    draw, out = torch.Generator().manual_seed(seed), dict(tensors)
    for layer in layers:
        names, groups, count = layer.layout, layer.groups, layer.heads // layer.groups

        def change(part, axis, how, prefix=layer.prefix):
            for name in (f"{prefix}{part}.weight", *([f"{prefix}{part}.bias"] if axis == 0 else [])):
                if name in out:
                    out[name] = how(out[name].movedim(axis, 0)).movedim(0, axis).contiguous()

        units = torch.randperm(out[f"{layer.prefix}{names.outer}.weight"].shape[1], generator=draw)
        for part, axis in (*((m, 0) for m in names.inner), (names.outer, 1)):
            change(part, axis, lambda t, units=units: t[units])
        size = out[f"{layer.prefix}{names.value}.weight"].shape[0] // groups
        order = torch.randperm(groups, generator=draw)
        heads = [torch.randperm(count, generator=draw) for _ in range(groups)]
        values = [torch.randperm(size, generator=draw) for _ in range(groups)]

        def cut(count, inside, order=order, heads=heads, values=values, groups=groups):
            def how(tensor):
                parts = tensor.reshape(groups, count, -1, *tensor.shape[1:])
                new = []
                for group in order.tolist():
                    part = parts[group]
                    part = part[heads[group]] if count > 1 else part
                    new.append(part[:, values[group]] if inside else part)
                return torch.stack(new).reshape(tensor.shape)

            return how

        change(names.query, 0, cut(count, False))
        change(names.key, 0, cut(1, False))
        change(names.value, 0, cut(1, True))
        change(names.output, 1, cut(count, True))
    return out


def opened_family(name):
    """A random model of a family in float64, its tensors, their headers and settings."""
    model = families.FAMILIES[name].model().double()
    torch.manual_seed(3)  # vectors are zeros and ones at first
    model.load_state_dict({n: t + 0.1 * torch.randn_like(t) for n, t in model.state_dict().items()})
    model.tie_weights()
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    headers = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    return model, tensors, headers, json.loads(model.config.to_json_string(use_diff=False))


FAMILY = [pytest.param(n, marks=[] if n in FEW else pytest.mark.whole) for n in families.FAMILIES]


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_is_refused_or_computes_the_same_and_is_found_again(name):
    model, tensors, headers, config = opened_family(name)
    if name not in KNOWN:
        said = [layout.said for layout in LAYOUTS]
        refused(lambda: unit_layers(headers, config, "model.align: it"), "model.align: it", *said, "align: none")
        return
    layers = unit_layers(headers, config, "here")
    whole = name != "ELECTRA"
    axes = all_axes(layers, headers, whole, "here")
    new = scrambled(tensors, layers)
    if whole:
        width = config.get("hidden_size") or config["dim"]
        stream = torch.randperm(width, generator=torch.Generator().manual_seed(4))
        new = {n: ordered(new.__getitem__, axes, {STREAM: stream})(n) for n in new}
    assert sum(not torch.equal(new[n], tensors[n]) for n in tensors) > len(tensors) / 3
    texts = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        before = model(input_ids=texts).logits
        model.load_state_dict(new)
        after = model(input_ids=texts).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # some classes compute norms in float32
    settings = ALL if whole else ALWAYS
    found = find_orders(tensors.__getitem__, new.__getitem__, headers, layers, axes, settings)
    back = ordered(new.__getitem__, axes, found.orders)
    assert all(torch.equal(back(n), tensors[n]) for n in tensors)
    assert found.figures.after == pytest.approx(1)
    assert found.figures.cosine < 0.3


def test_a_stream_that_is_not_known_keeps_its_order():
    _, _, headers, config = opened_family("ELECTRA")
    layers = unit_layers(headers, config, "here")
    refused(lambda: all_axes(layers, headers, True, "here"), "here", "word_embeddings", "align: both")


def test_the_best_order_of_all_orders():
    for seed in range(20):
        similarity = drawn(5, 5, seed=seed)
        best = max(permutations(range(5)), key=lambda p: sum(float(similarity[i, j]) for i, j in enumerate(p)))
        assert best_order(similarity).tolist() == list(best)


def test_units_stay_where_nothing_is_better():
    """Units that are alike can be exchanged, and are not."""
    assert best_order(torch.ones(6, 6)).tolist() == list(range(6))
    present = torch.tensor([2, 0, 1])
    assert best_order(torch.ones(3, 3), present).tolist() == present.tolist()


def value_of(ours, theirs, groups, heads, values):
    """⟨ours, theirs in this order⟩, from the formula."""
    total = 0.0
    for i, j in enumerate(groups):
        total += float((ours.key[i] * theirs.key[j]).sum())
        total += float((ours.value[i] * theirs.value[j][list(values[i])]).sum())
        for g, h in enumerate(heads[i]):
            total += float((ours.query[i, g] * theirs.query[j, h]).sum())
            total += float((ours.output[i, g] * theirs.output[j, h][list(values[i])]).sum())
    return total


@pytest.mark.parametrize("count", [1, 2])
def test_heads_against_all_orders(count):
    """With one head a group the best order is found, with more of them coordinate ascent comes near it."""
    groups, size = 2, 3
    reached = []
    for seed in range(6):
        ours, theirs = (
            Heads(*(drawn(*s, seed=10 * seed + n + 100 * m) for n, s in enumerate(
                ((groups, count, 2, 4), (groups, 2, 4), (groups, size, 4), (groups, count, size, 4))
            ))) for m in range(2)
        )  # fmt: skip
        one = [*product(permutations(range(count)), permutations(range(size)))]
        every = [
            value_of(ours, theirs, p, [a[0] for a in pick], [a[1] for a in pick])
            for p in permutations(range(groups)) for pick in product(one, repeat=groups)
        ]  # fmt: skip
        found = head_order(ours, theirs)
        value = value_of(ours, theirs, found.groups.tolist(), found.heads.tolist(), found.values.tolist())
        assert value <= max(every) + 1e-9
        reached.append((value - np.mean(every)) / (max(every) - np.mean(every)))
    assert min(reached) > (0.999999 if count == 1 else 0.6)
    assert np.mean(reached) > (0.999999 if count == 1 else 0.9)


def test_exact_transport_is_the_linear_programme_and_weight_matching_of_copies():
    for seed in range(5):
        ours, theirs = drawn(6, 9, seed=seed), drawn(6, 9, seed=seed + 50)
        cost = unit_costs(ours, theirs, "euclidean")
        sums = np.concatenate([np.kron(np.eye(6), np.ones(6))[None], np.kron(np.ones(6), np.eye(6))[None]])
        solved = linprog(cost.numpy().ravel(), A_eq=sums.reshape(12, 36), b_eq=np.full(12, 1 / 6))
        order = exact_order(cost)
        assert float(cost[order, torch.arange(6)].mean()) == pytest.approx(solved.fun, abs=1e-9)
        mixed = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        copy = ours[mixed]
        for metric in ("euclidean", "cosine"):
            found = exact_order(unit_costs(ours, copy, metric))
            assert torch.equal(found, unit_order(ours, copy))
            assert torch.equal(copy[found], ours)


def test_sinkhorn_meets_the_masses_and_the_plain_iterations():
    ours, theirs = drawn(5, 8, seed=1), drawn(7, 8, seed=2)
    cost = unit_costs(ours, theirs, "euclidean")
    assert (float(cost.min()), float(cost.max())) >= (0.0, 1.0)
    mine, other = unit_masses(ours, "norms"), unit_masses(theirs, "norms")
    torch.testing.assert_close(mine, ours.norm(dim=1) / ours.norm(dim=1).sum())
    for regularisation in (1.0, 0.1, 0.01):
        found = sinkhorn(cost, mine, other, regularisation)
        torch.testing.assert_close(found.sum(0), mine, atol=1e-8, rtol=0)
        torch.testing.assert_close(found.sum(1), other, atol=1e-8, rtol=0)
        u, kernel = torch.ones(7, dtype=torch.float64), (-cost / regularisation).exp()
        for _ in range(20000):
            v = mine / (kernel.T @ u)
            u = other / (kernel @ v)
        torch.testing.assert_close(found, u[:, None] * kernel * v, atol=1e-7, rtol=0)


def test_soft_transport_comes_to_the_hard_one_as_its_regularisation_goes_to_zero():
    ours = drawn(12, 20, seed=1)
    theirs = ours[torch.randperm(12, generator=torch.Generator().manual_seed(0))] + 0.3 * drawn(12, 20, seed=2)
    order = exact_order(unit_costs(ours, theirs, "euclidean"))
    hard = torch.zeros(12, 12)
    hard[order, torch.arange(12)] = 1.0
    away = [
        float((soft_transport(ours, theirs, r, "euclidean", "uniform") - hard).abs().max())
        for r in (1.0, 0.1, 0.03, 0.002)
    ]
    assert away == sorted(away, reverse=True)
    assert away[0] > 0.5
    assert away[-1] < 1e-6
    even = soft_transport(ours, theirs, 1e4, "euclidean", "uniform")
    torch.testing.assert_close(even, torch.full((12, 12), 1 / 12), atol=1e-4, rtol=0)
    assert soft_transport(ours, theirs[:9], 0.1, "cosine", "norms").shape == (9, 12)


def test_a_transport_that_moves_whole_units_is_an_order():
    tensor, order = torch.randn(6, 4), torch.tensor([3, 0, 5, 1, 2, 4])
    whole = torch.zeros(6, 6)
    whole[order, torch.arange(6)] = 1.0
    for axis, mixed in ((0, tensor), (1, tensor.T)):
        assert torch.equal(put_in_order(mixed, axis, whole), put_in_order(mixed, axis, order))
    vector = torch.randn(6)
    assert torch.equal(put_in_order(vector, 0, whole), vector[order])


def rewritten(folder, target, change):
    """A copy of a model's folder with changed tensors."""
    return families.rewrite(folder, target, change(load_file(folder / "model.safetensors")))


@pytest.fixture(scope="module")
def shuffled(models, tmp_path_factory):
    """The toys' expert a with all its hidden units in another order."""
    base = open_base(str(models / "base"))
    layers = unit_layers(base.headers, base.config, "here")
    target = tmp_path_factory.mktemp("shuffled") / "a"
    return rewritten(models / "a", target, lambda tensors: scrambled(tensors, layers))


@pytest.fixture
def view(models):
    def make(folder, settings=ALWAYS):
        base = open_base(str(models / "base"))
        return Realigned(open_expert(str(folder), base, "experts.it"), base, settings, "model.align")

    return make


def test_fine_tunes_of_one_base_are_left_as_they_are(view, models):
    for settings in (AlignmentSettings(), ALWAYS, ALL, AlignmentSettings(method="transport", when="always")):
        seen = view(models / "a", settings)
        assert seen.found.figures.cosine > 0.8
        assert seen.found.figures.moved == seen.found.figures.heads == 0
        assert not seen.found.orders
        assert seen.digest() == seen.inner.digest()
    assert "a mean cosine of 0." in seen.said()
    assert "none is moved" in seen.said()
    assert "stay where they are" in view(models / "a", AlignmentSettings()).said()


def test_a_shuffled_expert_is_the_expert_again(view, models, shuffled):
    plain = open_expert(str(models / "a"), open_base(str(models / "base")), "experts.a")
    for settings in (ALWAYS, ALL, AlignmentSettings()):
        seen = view(shuffled, settings)
        assert all(torch.equal(seen.tensor(n), plain.tensor(n)) for n in plain.names())
        assert seen.digest() not in (plain.digest(), seen.inner.digest())
        assert "are moved" in seen.said()
    mlp = view(shuffled, AlignmentSettings(parts="mlp", when="always"))
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(mlp.tensor(name), mlp.inner.tensor(name))
    assert torch.equal(mlp.tensor(name.replace("self_attn.v", "mlp.up")), plain.tensor(name.replace("self_attn.v", "mlp.up")))  # fmt: skip  # noqa: E501


def test_models_that_were_made_apart_become_more_alike(models, tmp_path, view):
    """Of another ancestry: auto aligns, and the inner product with the base only grows."""

    def other(tensors):
        draw = torch.Generator().manual_seed(8)
        return {n: torch.randn(t.shape, generator=draw) * 0.1 if t.dim() > 1 else t for n, t in tensors.items()}

    seen = view(rewritten(models / "a", tmp_path / "apart", other), AlignmentSettings(parts="all"))
    figures = seen.found.figures
    assert abs(figures.cosine) < 0.1
    assert figures.after > figures.cosine + 0.1
    assert figures.moved > 0.9
    products = [
        sum(float((model.tensor(n) * seen.base.tensor(n)).sum()) for n in seen.names()) for model in (seen.inner, seen)
    ]
    assert products[1] > products[0]
    soft = view(tmp_path / "apart", AlignmentSettings(method="transport", regularisation=0.06, when="always"))
    assert soft.found.figures.after > figures.cosine + 0.1
    assert "are mixed from others" in soft.said()
    assert all(soft.tensor(n).shape == seen.tensor(n).shape for n in seen.names())
    assert soft.digest() != seen.digest()


def test_orders_are_found_once(view, shuffled, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))
    first = view(shuffled)
    said, digest = first.said(), first.digest()
    (file,) = (tmp_path / module.CACHED_ORDERS).iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(module, "find_orders", None)
        assert (view(shuffled).said(), view(shuffled).digest()) == (said, digest)
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    assert (view(shuffled).said(), view(shuffled).digest()) == (said, digest)
    monkeypatch.setattr(module, "write_kept", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert view(shuffled, ALL).digest() == digest  # the same orders, and no cache


SEMANTIC = AlignmentSettings(parts="all", method="semantic", when="always")


@pytest.mark.parametrize("name", ["Mistral", "Llama 2"])
def test_a_stream_that_was_turned_is_turned_back_by_what_it_means(name):
    """Where all gains are equal, a turned stream is the same model; the head tells which turn it was."""
    model, tensors, headers, config = opened_family(name)
    tensors = {n: torch.ones_like(t) if n.endswith("norm.weight") else t for n, t in tensors.items()}
    layers = unit_layers(headers, config, "here")
    axes = all_axes(layers, headers, True, "here")
    width = config["hidden_size"]
    turn = torch.linalg.qr(drawn(width, width, seed=5)).Q.float()
    turned = {n: ordered(tensors.__getitem__, axes, {STREAM: turn})(n) for n in tensors}
    assert all(torch.allclose(t, torch.ones_like(t)) for n, t in turned.items() if n.endswith("norm.weight"))
    texts = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        before, after = ([model.load_state_dict(x), model(input_ids=texts).logits][1] for x in (tensors, turned))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    new = scrambled(turned, layers)
    found = find_orders(tensors.__getitem__, new.__getitem__, headers, layers, axes, SEMANTIC)
    torch.testing.assert_close(found.orders[STREAM], turn.T.contiguous(), rtol=0, atol=1e-5)
    back = ordered(new.__getitem__, axes, found.orders)
    for n, tensor in tensors.items():
        torch.testing.assert_close(back(n).double(), tensor, rtol=0, atol=1e-5)


def test_gains_follow_the_features_that_they_scale():
    axes, gain = {"norm.weight": [(0, STREAM)], "norm.bias": [(0, STREAM)]}, torch.tensor([1.0, 2.0, 5.0])
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    half = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    for name, turn, wanted in (
        ("norm.weight", swap, [2, 1, 5]), ("norm.bias", swap, [2, 1, 5]),
        ("norm.weight", half, [0.36 + 2 * 0.64, 0.64 + 2 * 0.36, 5]), ("norm.bias", half, [2.2, 0.4, 5]),
    ):  # fmt: skip
        found = module.brought(name, gain, axes, {STREAM: turn})
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))


def test_equal_heads_turn_nothing_and_others_are_said(view, models, tmp_path):
    same = view(models / "base", SEMANTIC)
    assert not same.found.orders
    assert same.digest() == same.inner.digest()
    heads = drawn(90, 12), drawn(90, 12, seed=1)
    turn = semantic_map(*heads).double()
    torch.testing.assert_close(turn.T @ turn, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
    left, _, right = torch.linalg.svd(torch.linalg.pinv(heads[0]) @ heads[1])
    torch.testing.assert_close(turn, (left @ right).T, rtol=0, atol=1e-6)
    seen = view(models / "a", SEMANTIC)
    assert "its stream is turned" in seen.said()
    assert all(seen.tensor(n).shape == seen.inner.tensor(n).shape for n in seen.names())


def test_what_cannot_be_turned_is_refused(models):
    assert "write parts: all" in AlignmentSettings(method="semantic").wrong
    base = open_base(str(models / "base"))
    few = {"lm_head.weight": TensorInfo((7, 64), torch.float32)}
    refused(lambda: token_head(few, "model.align.method"), "model.align.method", "7 tokens", "64 features", "matching")
    refused(lambda: token_head({}, "model.align.method"), "model.align.method", "no tensor with a row", "matching")
    assert token_head(base.headers, "here").endswith("weight")


def test_other_widths_have_no_partners(view, models, tmp_path):
    base = open_base(str(models / "base"))

    def cut(tensors):
        return {n: t[:100] if "gate" in n or "up_proj" in n else t[:, :100] if "down" in n else t for n, t in tensors.items()}  # fmt: skip  # noqa: E501

    narrow = open_base(str(rewritten(models / "a", tmp_path / "narrow", cut)), "experts.narrow")
    said = ("experts.narrow", "mlp.gate_proj.weight", "(128, 64)", "(100, 64)", "same widths")
    refused(lambda: Realigned(narrow, base, ALWAYS, "model.align"), *said)


def test_words_and_mappings():
    def meant(align, heads="merged"):
        return ModelSettings(base="b", align=align, heads=heads).alignment

    assert meant("none") is None
    assert (meant("auto").parts, meant("auto").when) == ("all", "different")
    assert meant("auto", "apart").parts == "both"
    assert (meant("mlp").parts, meant("mlp").when) == ("mlp", "always")
    assert meant({"parts": "heads"}) == AlignmentSettings(parts="heads")
    assert AlignmentSettings(method="transport", regularisation=0.1, masses="norms").wrong is None


def test_the_mean_cosine_by_hand(models):
    base = open_base(str(models / "base"))
    layers = unit_layers(base.headers, base.config, "here")
    other = open_expert(str(models / "a"), base, "experts.a")
    rows = [
        torch.cat([torch.cat([m.tensor(f"model.layers.{n}.mlp.{k}_proj.weight") for k in ("gate", "up")], 1)
                   for n in range(2)]) for m in (base, other)
    ]  # fmt: skip
    expected = float(torch.nn.functional.cosine_similarity(*rows, dim=1).mean())
    assert mean_cosine(base.tensor, other.tensor, layers) == pytest.approx(expected, abs=1e-6)


@pytest.mark.whole
def test_the_measure_is_explained(make_config, tmp_path, shuffled):
    done = toys.evolver("explain", make_config(tmp_path), "--experts")
    assert "## Ancestry" in done.out
    assert "nothing to align" in done.out
    done = toys.evolver("explain", make_config(tmp_path, {"experts.a": str(shuffled)}), "--experts")
    assert "a: their hidden units are not at the places of the base's" in done.out


@pytest.mark.whole
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_merge_of_a_model_and_its_copy_is_the_model(models, tmp_path, share):
    base = open_base(str(models / "base"))
    layers = unit_layers(base.headers, base.config, "here")
    copy = rewritten(models / "base", tmp_path / "copy", lambda tensors: scrambled(tensors, layers))
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((models / "base", 1 - share), (copy, share))]
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "base_model": str(models / "base"), "models": entries}))
    right = load_file(models / "base" / "model.safetensors")
    for align in ("both", "all", "auto"):
        done = toys.evolver("merge", file, tmp_path / align, "--align", align)
        assert done.code == 0, done.err
        assert "are moved" in done.err
        assert f"--align {align}" in (tmp_path / align / "README.md").read_text()
        found = load_file(tmp_path / align / "model.safetensors")
        assert all(torch.allclose(found[n], right[n], atol=1e-7) for n in right)
    done = toys.evolver("merge", file, tmp_path / "wrong", "--align", "some")
    assert done.code == 2


def scores(run):
    """What every model of a run scored, by stage and number."""
    return {k: (row["status"], row["score"]) for k, row in toys.rows(run).items()}


@pytest.mark.whole
def test_a_run_with_a_shuffled_expert_is_the_run_with_the_expert(make_config, tmp_path, models, shuffled):
    changes = {**toys.SHORT, "search.generations": 1}
    plain = toys.run_here(make_config(tmp_path, changes, "plain.yaml"), tmp_path / "plain")
    moved = {**changes, "experts.a": str(shuffled)}
    file = make_config(tmp_path, {**moved, "model.align": "both"}, "aligned.yaml")
    display = toys.Silent()
    aligned = toys.run_here(file, tmp_path / "aligned", display=display)
    assert [line for line in display.lines if "experts.a " in line and "are moved" in line]
    assert [line for line in display.lines if "experts.b " in line and "none is moved" in line]
    assert scores(aligned) == scores(plain)
    lost = toys.run_here(make_config(tmp_path, moved, "lost.yaml"), tmp_path / "lost")
    assert scores(lost) != scores(plain)

    again = toys.run_here(file, tmp_path / "aligned", toys.no_work)
    assert scores(again) == scores(aligned)
    other = make_config(tmp_path, {**moved, "model.align": "all"}, "aligned.yaml")
    refused(lambda: toys.run_here(other, tmp_path / "aligned"), "another configuration", "align")


@pytest.mark.whole
def test_an_expert_whose_units_are_mixed_is_scored_as_it_is(make_config, tmp_path):
    changes = {**toys.SHORT, "search.generations": 1}
    soft = {"method": "transport", "regularisation": 0.3, "when": "always"}
    plain, mixed = (
        toys.run_here(make_config(tmp_path, {**changes, **more}, f"{name}.yaml"), tmp_path / name)
        for name, more in (("plain", {}), ("mixed", {"model.align": soft}))
    )
    told = [{k: v for k, v in scores(run).items() if k[0] != "search"} for run in (plain, mixed)]
    assert told[0].keys() == told[1].keys()
    assert scores(plain) != scores(mixed)


@pytest.mark.whole
def test_what_cannot_be_aligned_is_refused_before_a_run(make_config, tmp_path):
    for value, said in (
        ("bothe", "model.align: 'bothe' is not usable; did you mean 'both'"),
        ({"regularisation": 0.1}, "model.align.regularisation: matching moves whole units; write method: transport"),
        ({"method": "transport", "masses": "norms"}, "model.align.masses: whole units count alike"),
        ({"regularisation": 2.0}, "model.align.regularisation"),
        ({"parts": "all", "reference": 1}, "model.align.reference: unknown key"),
    ):
        done = toys.evolver("validate", make_config(tmp_path, {"model.align": value}))
        assert said in toys.refusal(done.code, done.err)
    heads = {"model.kind": "classifier", "model.heads": "union", "model.align": "all"}
    done = toys.evolver("validate", make_config(tmp_path, heads))
    assert "model.align: with heads that are not merged" in toys.refusal(done.code, done.err)
