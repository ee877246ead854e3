"""What task vectors have in common: by hand-made tensors, of models on disk, and as `evolver explain --experts`."""

import pytest
import torch
import toys
import yaml

from evolver.checkpoints.sources import open_base, open_expert
from evolver.merging import likeness as measures
from evolver.merging.likeness import Likeness, effective_rank, likeness, tensor_likeness
from evolver.commands.experts import experts_text, warnings


def test_the_effective_rank_counts_equally_strong_directions():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.ones(9))) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 4)) == 0
    draw = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(draw)
    assert effective_rank(draw) == pytest.approx(float(s.square().sum() ** 2 / (s**4).sum()))


def test_scalars_in_dispute_by_hand():
    """Of six scalars, one is changed by nobody, one by one expert, four by two and more, of which two are disputed."""
    base = torch.ones(6)
    moved = [[0, 1, 1, 1, -1, 0], [0, 0, 1, -1, -1, 2], [0, 0, 0, 3, -1, -1]]
    found = tensor_likeness(base, [base + torch.tensor(m, dtype=torch.float32) for m in moved])
    assert (found.shared, found.disputed, found.base) == (4, 2, 6.0)
    assert (found.ranks, found.overlap) == ((), ())


def test_overlap_is_one_in_the_same_span_and_zero_in_orthogonal_ones():
    base, draw = torch.zeros(20, 60), torch.Generator().manual_seed(0)
    spans = torch.linalg.qr(torch.randn(60, 60, generator=draw)).Q
    one, same, other = (torch.randn(20, 16, generator=draw) @ spans[:, a : a + 16].T for a in (0, 0, 30))
    assert tensor_likeness(base, [one, same]).overlap[0] == pytest.approx(1, abs=1e-4)
    assert tensor_likeness(base, [one, other]).overlap[0] == pytest.approx(0, abs=1e-4)
    assert tensor_likeness(base, [one, other]).chance == (16 / 60,)
    assert tensor_likeness(base, [one, base]).overlap == (None,)


@pytest.fixture(scope="module")
def opened(models):
    base = open_base(str(models / "base"))
    return base, [open_expert(str(models / name), base, name) for name in ("a", "b")]


def test_of_models_on_disk(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))
    base, experts = opened
    seen = []
    model, layers = likeness(base, experts, seen.append)
    floating = [n for n, info in base.headers.items() if info.dtype.is_floating_point]
    assert seen == floating
    deltas = [
        torch.cat([(e.tensor(n).double() - base.tensor(n).double()).flatten() for n in floating]) for e in experts
    ]
    assert model.norms == pytest.approx([float(d.norm()) for d in deltas], rel=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(*deltas, dim=0))
    assert model.cosines[0][1] == pytest.approx(cosine, abs=1e-5)
    assert sum(part.tensors for part in layers.values()) == model.tensors == len(floating)
    assert sum(part.norms[0] ** 2 for part in layers.values()) == pytest.approx(model.norms[0] ** 2, rel=1e-6)
    monkeypatch.setattr(measures, "tensor_likeness", None)  # it is remembered
    assert likeness(base, experts) == (model, layers)


def some(norms, cosine, relative=(0.01, 0.01)):
    return Likeness(1, norms, relative, ((1.0, cosine), (cosine, 1.0)), 0.5, (3.0, 3.0), 0.2, 0.1)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (some((1.0, 1.0), 0.2), []),
        (some((1.0, 9.0), 0.2), ["b is 9.0 times as long as that of a"]),
        (some((1.0, 0.0), 0.0), []),
        (some((1.0, 1.0), 0.99), ["a and b are nearly the same model"]),
        (some((1.0, 1.0), -0.3), ["a and b pull against each other"]),
        (some((1.0, 1.0), 0.2, (0.5, 0.5)), ["a and b lie far from the base"]),
        (some((1.0, 1.0), 0.2, (0.5, 0.1)), ["a lies far from the base"]),
    ],
)
def test_warnings(found, said):
    lines = warnings(["a", "b"], found)
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert part in line
    assert experts_text(["a", "b"], found, {None: found, 0: found}).count("**Look at this.**") == len(said)


def test_the_command_prints_tables_and_writes_a_picture(make_config, tmp_path):
    file = make_config(tmp_path, {})
    done = toys.evolver("explain", file, "--experts", "--picture", tmp_path / "experts.png")
    assert done.code == 0, done.err
    assert "## Cosines between task vectors" in done.out
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_a_mergekit_file_can_be_asked_too(models, tmp_path):
    listed = [{"model": str(models / n), "parameters": {"weight": 1}} for n in ("a", "b")]
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "ties", "base_model": str(models / "base"), "models": listed}))
    done = toys.evolver("explain", file, "--experts")
    assert done.code == 0, done.err
    assert "| a | " in done.out


@pytest.mark.parametrize(
    ("options", "said"), [(["--picture", "x.png"], "--picture is a picture of"), (["--experts", "--prompts"], "else")]
)
def test_options_that_do_not_fit(make_config, tmp_path, options, said):
    done = toys.evolver("explain", make_config(tmp_path, {}), *options)
    assert done.code == 2
    assert said in done.err
