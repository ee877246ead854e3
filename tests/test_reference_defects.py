"""Defects that were found in published code, by system, each with what this project does instead.

Others are where the methods' own tests are. In tests/test_methods.py: breadcrumbs on small tensors, TIES on tiny ones,
DELLA's probabilities, SCE without variance, and DARE's rescaling in the papers' form. In tests/test_materialise.py:
trimming over the model as a whole. In tests/test_elementwise.py: NeuroMerging of one expert, and FRANK's prior.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_elementwise import deltas_of, trimmed
from test_methods import REQUIRED, TAKES, experts_of, merge, one

from evolver.merging.methods import METHODS
from evolver.records.recipe import layer_of

SCALED = [n for n, m in METHODS.items() if m.on_deltas and "lambda" in m.settings]


def moved(name, experts, base, **given):
    return merge(name, experts, base, **given).double() - base.double()


class TestMergekit:
    @pytest.mark.parametrize("gamma", [0.0, 0.001, 0.25])
    @pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
    def test_breadcrumbs_zeroes_no_tensor(self, name, gamma):
        """Where no scalar is too large, all of the tensor was dropped; here it keeps its share."""
        base, experts = experts_of(name, (10, 10), count=1)
        kept = moved(name, experts, base, gamma=gamma, density=0.5, weight=1.0) != 0
        assert kept.sum() == 50
        size = deltas_of(experts, base)[0].abs()
        assert (size[kept].max() == size.max()) == (int(gamma * 100) == 0)

    def test_rescaling_is_the_papers_or_the_norm_as_one_says(self):
        """DARE in the paper divides by the probability to be kept; mergekit restores the L1 norm."""
        base, experts = experts_of("dare_linear", (40, 50), count=1)
        (delta,) = deltas_of(experts, base)
        by_probability, by_norm, bare = (
            moved("dare_linear", experts, base, density=0.3, weight=1.0, rescale=r) for r in ("inv_p", "l1", "none")
        )
        kept = bare != 0
        assert torch.allclose(by_probability[kept], delta[kept] / 0.3, atol=1e-6)
        assert torch.allclose(by_norm[kept], delta[kept] * (delta.abs().sum() / delta[kept].abs().sum()), atol=1e-6)

    def test_ties_divides_by_the_weights_that_agree(self):
        assert one("ties", [[3, 1], [1, -2]], weight=[1, 3]) == [1.5, -2]

    @pytest.mark.parametrize("density", [0.02, 0.5, 0.98, 1.0])
    @pytest.mark.parametrize("epsilon", [0.0, 0.3])
    def test_della_cuts_a_distance_that_does_not_fit(self, density, epsilon):
        base, experts = experts_of("della_linear", (40, 100), count=1)
        share = (
            (moved("della_linear", experts, base, density=density, epsilon=epsilon, weight=1.0) != 0).double().mean()
        )
        assert share.item() == pytest.approx(density, abs=0.04)

    @pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
    @pytest.mark.parametrize("mask_delta", [True, False])
    def test_sce_keeps_the_shape_of_a_tensor_that_nobody_changed(self, share, mask_delta):
        base, _ = experts_of("sce", (10, 10))
        merged = merge("sce", [base.clone() for _ in range(3)], base, select_topk=share, mask_delta=mask_delta)
        assert torch.equal(merged, base)

    def test_sce_in_both_forms(self):
        """mergekit also leaves out what was not selected; the authors' code selects for the weights only."""
        given = {"select_topk": 0.5}  # variances 0.5, 2: the second; energies 9 : 1
        assert one("sce", [[1, 3], [2, 1]], **given) == pytest.approx([0, 2.8])
        assert one("sce", [[1, 3], [2, 1]], mask_delta=False, **given) == pytest.approx([1.1, 2.8])

    def test_nearswap_is_clipping(self):
        """mergekit interpolates by t / |τ|, at most 1; that is base + clip(τ, -t, t), without a division."""
        base, (expert,) = experts_of("nearswap", (30, 40))
        expert[:3] = base[:3]
        delta = expert.double() - base.double()
        share = torch.where(delta != 0, 0.005 / delta.abs(), 1.0).clamp(max=1.0)
        wanted = (1 - share) * base.double() + share * expert.double()
        assert torch.allclose(merge("nearswap", [expert], base, t=0.005).double(), wanted, atol=1e-7)

    def test_arcee_fusion_is_the_formula(self):
        base, (expert,) = experts_of("arcee_fusion", (30, 41))
        ours, theirs = (torch.softmax(t.double(), dim=-1) + 1e-8 for t in (expert, base))
        divergence = (ours * (ours / theirs).log()).sum(-1, keepdim=True)
        importance = (expert.double() - base.double()).abs() * divergence
        ordered = importance.flatten().sort().values
        low, median, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
        wanted = torch.where(importance >= median + 1.5 * (high - low), expert, base)
        different = (merge("arcee_fusion", [expert], base) - wanted).abs() > 1e-6
        assert different.sum() <= 2  # importance is computed in float32, so that one at the edge may fall otherwise
        assert (wanted != base).sum() > 20

    @pytest.mark.parametrize("filter_wise", [False, True])
    def test_model_stock_of_deltas_that_cancel_is_the_base(self, filter_wise):
        """t = N c / (1 + (N - 1) c) divides by zero there."""
        base, (expert, *_) = experts_of("model_stock", (10, 16))
        base, expert = ((t * 1024).round() / 1024 for t in (base, expert))
        merged = merge("model_stock", [expert, 2 * base - expert], base, filter_wise=filter_wise)
        assert torch.equal(merged, base)

    def test_model_stock_follows_the_cosine(self):
        """The table of the reference page for four models: c = 0 → 0, 0.1 → 0.31, 0.5 → 0.80, 1 → 1."""
        for c, t in ((0.0, 0.0), (0.1, 4 * 0.1 / 1.3), (0.5, 0.8), (1.0, 1.0)):
            axes = torch.eye(5)
            models = [math.sqrt(c) * axes[4] + math.sqrt(1 - c) * axes[k] for k in range(4)]
            merged = merge("model_stock", models, torch.zeros(5))
            assert torch.allclose(merged, t * sum(models) / 4, atol=1e-5)


class TestTallMasks:
    @pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [1 / 3] * 3, [0.2, 0.3, 0.5]])
    @pytest.mark.parametrize("agree", [0, 1, 2, 3])
    def test_masks_compare_task_vectors_in_the_scale_of_their_sum(self, weight, agree):
        """A merged model in the place of the merged task vector gave other masks; so do weights that sum to 1, if they
        are not scaled. And the mask is laid on the merged task vector, not on the experts' own.
        """
        base, experts = experts_of("consensus", (20, 30))
        deltas = deltas_of(experts, base)
        own = [3 * w / sum(weight) * d for w, d in zip(weight, deltas, strict=True)]
        votes = sum((d.abs() > 0.6 * (sum(own) - d).abs()).int() for d in own)
        wanted = 1.2 * torch.where(votes >= agree, sum(w * d for w, d in zip(weight, deltas, strict=True)), 0.0)
        given = {"weight": weight, "tall": 0.6, "agree": agree, "lambda": 1.2}
        assert torch.allclose(moved("consensus", experts, base, **given), wanted, atol=1e-7)

    def test_the_weights_that_a_search_draws_give_the_masks_of_the_paper(self):
        base, experts = experts_of("consensus", (20, 30))
        whole = moved("consensus", experts, base, weight=1.0)
        shares = moved("consensus", experts, base, weight=1 / 3, **{"lambda": 3.0})
        assert torch.allclose(whole, shares, atol=1e-7)


class TestLines:
    @pytest.mark.parametrize(
        ("name", "layer"),
        [
            ("model.layers.12.mlp.experts.3.down_proj.weight", 12),
            ("model.layers.3.mlp.experts.12.down_proj.weight", 3),
            ("model.layers.1.self_attn.q_proj.weight", 1),
            ("model.layers.11.self_attn.q_proj.weight", 11),
            ("transformer.h.7.mlp.c_fc.weight", 7),
            ("encoder.block.5.layer.1.DenseReluDense.wi.weight", 5),
            ("vision_model.encoder.layers.4.mlp.fc1.weight", 4),
            ("model.embed_tokens.weight", None),
            ("lm_head.weight", None),
        ],
    )
    def test_the_layer_is_not_the_number_of_an_expert(self, name, layer):
        """Looking for ".3." finds the third expert of the twelfth layer."""
        assert layer_of(name) == layer

    @pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.2, 0.3, 0.5], [2.0, 0.0, 1.0]])
    def test_the_scale_of_many_tasks_is_the_ratio_of_l1_norms(self, weight):
        base, experts = experts_of("lines", (20, 30))
        deltas = deltas_of(experts, base)
        mixed = sum(w * d for w, d in zip(weight, deltas, strict=True))
        f = sum(deltas).abs().sum() / mixed.abs().sum() / 3
        ours = moved("lines", experts, base, weight=weight, match="l1", alpha=1.0, beta=0.6)
        assert torch.allclose(ours, f * (1 + 0.6 / 3) * mixed, atol=1e-7)  # a third of the way down

    def test_with_equal_weights_it_is_the_average(self):
        base, experts = experts_of("lines", (20, 30))
        for weight in (1.0, 0.1):
            merged = merge("lines", experts, base, weight=weight, match="l1")
            assert torch.allclose(merged, sum(experts) / 3, atol=1e-7)


class TestMergedAfterwardsIsScaled:
    """Forks of mergekit overwrote the merged delta after the weights and λ were applied, so that both were ignored."""

    @pytest.mark.parametrize("name", SCALED)
    def test_twice_the_mass_is_twice_the_way(self, name):
        base, experts = experts_of(name, (30, 24))
        base, experts = base.double(), [e.double() for e in experts]
        once, twice = (moved(name, experts, base, **{"lambda": mass}) for mass in (0.4, 0.8))
        assert torch.allclose(2 * once, twice, atol=1e-6)
        assert once.abs().max() > 1e-4

    @pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "weight" in m.settings])
    def test_weights_count(self, name):
        base, experts = experts_of(name, (30, 24))
        more = {"density": 0.5} if "density" in METHODS[name].settings else {}
        found = [
            merge(name, experts, base, weight=weights[: len(experts)], **more)
            for weights in ([0.1, 0.3, 0.6], [0.6, 0.3, 0.1])
        ]
        assert not torch.allclose(*found, atol=1e-5)


class TestCrdtMerging:
    @pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
    def test_draws_follow_the_recipe_and_not_the_order(self, name):
        """One fixed seed for all, and an order by names, make equal draws for different merges: here the draws of an
        expert follow from its own hash, the tensor's name and the recipe's seed.
        """
        base, experts = experts_of(name, (30, 40))
        ids, given = list("abc"), {"density": 0.5}
        first = merge(name, experts, base, ids, **given)
        assert torch.allclose(merge(name, experts[::-1], base, ids[::-1], **given), first, atol=1e-7)
        assert not torch.allclose(merge(name, experts, base, list("abd"), **given), first, atol=1e-4)
        assert not torch.allclose(merge(name, experts, base, ids, seed=1, **given), first, atol=1e-4)


class TestLmCocktail:
    @pytest.mark.parametrize("name", ["mwa", "lm_cocktail"])
    @pytest.mark.parametrize("measured", [[1e-6, 1e-6, 1e-6], [3.0, 40.0, 500.0], [1e3, 1.0, 1e-3]])
    def test_weights_sum_to_one(self, name, measured):
        """Sums far below 1 passed for right; here what all experts share is kept whatever was measured."""
        base, _ = experts_of(name, (10, 10))
        shared = base + 0.25
        assert torch.allclose(merge(name, [shared] * 3, base, measured=measured), shared, atol=1e-6)


class TestTiesMergingLibraries:
    @pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "density" in m.settings and m.on_deltas])
    def test_trimming_trims(self, name):
        """A loop that assigned to its own variable left every task vector as it was (Reinforced Model Merging)."""
        base, experts = experts_of(name, (30, 40), count=1)
        more = {"weight": 1.0} if "weight" in METHODS[name].settings else {}
        # Coordinates of a shared basis are trimmed, which leaves no zeros among the scalars of the merge.
        if name in ("knots", "core_space"):
            base, experts = experts_of(name, (30, 40))
            trimmed, same = (moved(name, experts, base, density=d, inner="ties", **more) for d in (0.2, 1.0))
            assert (trimmed - same).norm() > 0.1 * same.norm()
            return
        more |= {k: v for k, v in (METHODS[name].identity or {}).items() if k != "density"}  # what fills nothing in
        whole, few = (moved(name, experts, base, density=d, **more) for d in (1.0, 0.2))
        assert (few.abs() > 1e-9).double().mean() < 0.25 < 0.75 < (whole.abs() > 1e-9).double().mean()


class TestPcb:
    """Paper, README and code of PCB-Merging have three formulas; two are choices here, the third could not be read."""

    @pytest.mark.parametrize("inter", ["pairs", "sum"])
    @pytest.mark.parametrize("clip", [0.0, 0.02])
    def test_both_balances_are_their_formulas(self, inter, clip):
        base, experts = experts_of("pcb", (20, 30))
        deltas, scores = deltas_of(experts, base), []
        bounds = [d.abs().flatten().sort(descending=True).values[max(1, int(clip * 600)) - 1] for d in deltas]
        units = [(d / b).clamp(-1, 1) for d, b in zip(deltas, bounds, strict=True)]
        for d, n in zip(deltas, units, strict=True):
            agreement = torch.tanh(d * sum(deltas)) if inter == "sum" else sum(torch.tanh(n * o) for o in units)
            beta = (torch.exp(3 * n.square()) * agreement).clamp(min=0)
            kept = trimmed(beta, 0.3)
            top, cut = beta.max(), kept[kept > 0].min()
            scores.append(torch.where(kept > 0, (beta - cut) / (top - cut), 0.0))
        weight = [0.2, 0.3, 0.5]
        total = sum(scores)
        wanted = sum(w * s * d for w, s, d in zip(weight, scores, deltas, strict=True))
        wanted = 1.2 * wanted / torch.where(total > 0, total, 1.0)
        ours = moved("pcb", experts, base, weight=weight, density=0.3, inter=inter, clip=clip)
        assert torch.allclose(ours, wanted, atol=1e-5)


class TestWiden:
    def test_it_is_the_formula(self):
        base, experts = experts_of("widen", (12, 25))
        moves = []
        for e in experts:
            norms, before = e.double().norm(dim=0), base.double().norm(dim=0)
            cosine = (e.double() * base.double()).sum(0) / norms / before
            moves.append(((norms - before).abs(), 1 - cosine))
        wanted = base.double()
        ranks = [torch.stack([m[part].argsort().argsort() / 25 for m in moves]).double() for part in (0, 1)]
        for k, e in enumerate(experts):
            scores = [torch.where(r > r.mean(1, keepdim=True), 0.9, torch.softmax(r, 0))[k] for r in ranks]
            wanted = wanted + 0.7 * (scores[0] + scores[1]) / 2 * (e.double() - base.double())
        merged = merge("widen", experts, base, calibration=0.9, **{"lambda": 0.7})
        assert torch.allclose(merged.double(), wanted, atol=1e-6)

    def test_vectors_are_weighed_by_their_size_itself(self):
        base, experts = experts_of("widen", (50,))
        size = torch.stack([d.abs() for d in deltas_of(experts, base)])
        score = torch.where(size > size.mean(1, keepdim=True), 1.0, torch.softmax(size, 0))
        wanted = base.double() + sum(s * d for s, d in zip(score, deltas_of(experts, base), strict=True))
        assert torch.allclose(merge("widen", experts, base).double(), wanted, atol=1e-7)


class TestEmr:
    def test_it_is_the_elected_vector_alone(self):
        """Masks and factors of the tasks need to know the task of an input; they belong to no static merge."""
        base, experts = experts_of("emr_max", (20, 30))
        deltas = torch.stack(deltas_of(experts, base))
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).double()
        wanted = sign * torch.where(deltas * sign > 0, deltas.abs(), 0.0).amax(0)
        assert torch.allclose(moved("emr_max", experts, base), wanted, atol=1e-7)
        assert list(METHODS["emr_max"].settings) == ["lambda"]


class TestRam:
    def test_what_one_expert_moved_is_kept_whole_and_the_rest_is_averaged(self):
        base, _ = experts_of("ram", (8, 8))
        alone = [torch.zeros(8, 8) for _ in range(2)]
        alone[0][:4], alone[1][4:] = 0.5, -0.25
        assert torch.allclose(merge("ram", [base + d for d in alone], base), base + sum(alone), atol=1e-6)
        both = [torch.full((8, 8), 0.5), torch.full((8, 8), 0.25)]
        assert torch.allclose(merge("ram", [base + d for d in both], base), base + 0.375, atol=1e-6)


def test_every_method_that_needs_a_setting_or_a_number_of_models_is_tried_here():
    assert {n for n, m in METHODS.items() if any(s.required for s in m.settings.values())} <= REQUIRED.keys()
    assert {n for n, m in METHODS.items() if m.takes} == TAKES.keys()
