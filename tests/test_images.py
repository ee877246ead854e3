"""Image classifiers: scores held against a plain loop, whatever holds the images, and a whole search."""

from __future__ import annotations

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toys
import yaml
from PIL import Image
from toys import digits, rows, run_here
from transformers import AutoImageProcessor, AutoModelForImageClassification

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.collectors.inputs import LayerSums
from evolver.records import Candidate
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    toys.make_image_classifiers(folder)
    return folder


@pytest.fixture
def configured(experts, tmp_path):
    def make(data, **changes):
        entry = {"task": "digits", "data": data, "dev": 30, "report": 30, **changes}
        raw = {
            "run": "digits", "model": {"base": str(experts / "base"), "kind": "image-classifier"},
            "experts": {n: str(experts / n) for n in ("a", "b")}, "search": {"algorithm": "evolver", "generations": 2},
            "budget": {"candidates": 6}, "evaluation": {"tasks": [entry], "batch_size": 7},
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        return tmp_path / "run.yaml"

    return make


@pytest.fixture
def paths(tmp_path):
    lines = []
    for number, (image, label) in enumerate(digits()):
        (tmp_path / f"{number}.png").write_bytes(image)
        lines.append(json.dumps({"image": f"{number}.png", "label": label}))
    (tmp_path / "digits.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "digits.jsonl")


@pytest.fixture
def parquet(tmp_path):
    table = [{"image": {"bytes": image, "path": None}, "label": label} for image, label in digits()]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "digits.parquet")
    return str(tmp_path / "digits.parquet")


@pytest.fixture
def dataset(tmp_path):
    import datasets

    held = [{"image": {"bytes": image, "path": None}, "label": label} for image, label in digits()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(held, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    return {"path": str(tmp_path / "set"), "split": "train"}


@pytest.fixture
def saved(dataset, tmp_path):
    """As save_to_disk leaves it."""
    import datasets

    datasets.load_dataset(dataset["path"]).save_to_disk(tmp_path / "saved")
    return {"path": str(tmp_path / "saved"), "split": "train"}


@pytest.mark.parametrize("kind", ["paths", "parquet", "dataset", "saved"])
def test_answers_are_those_of_a_plain_loop(configured, experts, kind, request):
    ready = prepare(config_at(configured(request.getfixturevalue(kind))))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.status == "ok", result.reason
    model = AutoModelForImageClassification.from_pretrained(experts / "a").eval()
    processor = AutoImageProcessor.from_pretrained(experts / "a")
    images, expected = list(digits()), []
    for item in ready.tasks.items.dev:
        data, label = images[item.index]
        pixels = processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            expected.append(float(int(model(pixels).logits[0].argmax()) == label))
    assert list(result.items) == expected
    assert 0 < sum(expected) < len(expected)
    shown = ready.tasks.show("dev", range(len(expected)))
    words = worker.scorer.score(0, len(expected)).words
    assert [float(said == shown[place].right) for place, said in enumerate(words)] == expected
    assert all(text.prompt.startswith("the image of row ") for text in shown.values())


def test_an_image_is_the_same_item_wherever_it_lies(configured, paths, parquet, dataset, saved):
    kinds = (paths, parquet, dataset, saved)
    hashes = [sorted(i.hash for i in prepare(config_at(configured(data))).tasks.items.dev) for data in kinds]
    assert len(set(hashes[0])) == 30
    assert all(found == hashes[0] for found in hashes)


def test_a_whole_search(configured, paths, tmp_path):
    folder = run_here(configured(paths, metric="macro_f1"), tmp_path / "results")
    assert not [r["reason"] for r in rows(folder).values() if r["status"] != "ok"]
    assert json.loads((folder / "best.json").read_text()) == {"items": 30, "equal": 30}
    AutoModelForImageClassification.from_pretrained(folder / "best")
    AutoImageProcessor.from_pretrained(folder / "best")


def test_an_image_that_is_not_there_is_named(configured, tmp_path):
    (tmp_path / "digits.jsonl").write_text(json.dumps({"image": "gone.png", "label": 1}))
    with pytest.raises(BadInput, match=r"evaluation.tasks\[0\].data: the image gone.png cannot be read"):
        prepare(config_at(configured(str(tmp_path / "digits.jsonl"))))


def test_a_broken_image_is_named(configured, paths, tmp_path):
    (tmp_path / "4.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"evaluation.tasks\[0\].data: the image of row 5 has no known format"):
        prepare(config_at(configured(paths)))


def test_a_model_without_an_image_processor_is_one_sentence(configured, experts, paths, tmp_path):
    shutil.copytree(experts / "base", tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    file = configured(paths)
    file.write_text(file.read_text().replace(str(experts / "base"), str(tmp_path / "base")))
    with pytest.raises(BadInput, match=r"model\.base: .* has no image processor that can be read"):
        prepare(config_at(file), device="cpu")


def test_every_place_of_an_image_is_seen_by_the_layers(configured, paths):
    """Four patches and one place more, of every image; the head sees one place of each."""
    ready = prepare(config_at(configured(paths)))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    with LayerSums(worker.live, worker.live.linear_layers(), lambda rows: torch.tensor(len(rows))) as counted:
        worker.scorer.score(0, 30)
    assert int(counted.totals.pop("classifier.weight")) == 30
    assert {int(count) for count in counted.totals.values()} == {30 * (4 + 1)}
