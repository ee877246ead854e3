"""Rows of data sets: every kind of file, and a folder that the datasets library reads."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from evolver.config.evaluation import DataSet
from evolver.errors import BadInput
from evolver.evaluation.data import read_rows

ROWS = [{"text": "good, or\tbetter", "label": "1"}, {"text": "ünfair\nat last", "label": "0"}]


def write(folder, kind):
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")
    else:
        gap = "," if kind == "csv" else "\t"
        lines = [gap.join(('"text"', '"label"')), *(gap.join(f'"{v}"' for v in r.values()) for r in ROWS)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_a_file(kind, tmp_path):
    assert read_rows(str(write(tmp_path, kind)), "here") == ROWS


def test_a_json_file_may_hold_one_array(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    assert read_rows(str(tmp_path / "rows.json"), "here") == ROWS


def test_a_set_of_the_datasets_library(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path, "parquet").rename(tmp_path / "set" / "test.parquet")
    assert read_rows(DataSet(path=str(tmp_path / "set"), split="test"), "here") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.xlsx", "", "has no known extension; give a file of .jsonl"),
        ("rows.jsonl", "{", "cannot be read"),
        ("rows.jsonl", "3", "row 1 of"),
        ("rows.parquet", "no table", "cannot be read"),
        ("rows.csv", 'a,b\n"1"x,2\n', "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=r"^here: .*") as refused:
        read_rows(str(tmp_path / name), "here")
    assert says in str(refused.value)


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"^here: the data set .* cannot be loaded .*; check path, name and split"):
        read_rows(DataSet(path=str(tmp_path / "nowhere"), split="test"), "here")
