"""The user's own texts as a task of lm-eval that measures perplexity. Each passage is an item."""

from __future__ import annotations

from typing import Any

from evolver.config.evaluation import DataSet
from evolver.errors import BadInput, nearest
from evolver.evaluation.data import read_rows

PASSAGE_METRICS = {
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}


def passages(name: str, data: str | DataSet, column: str, key: str) -> dict[str, Any]:
    """The configuration of an lm-eval task over the texts in a column of a data set, or the passages of a text file.

    Args:
        name: name of the task.
        data: a file or data set, as ``read_rows`` takes it.
        column: the column with the texts.
        key: the key of the configuration that errors name.

    Raises BadInput where the data cannot be read, are empty, or lack the column.
    """
    rows = read_rows(data, key)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str):
            raise BadInput(f"{key}: row {number} has no text under {column!r}; {nearest(column, map(str, row))}")
    if not rows:
        raise BadInput(f"{key}: the data hold no text; name data that are not empty.")

    def dataset(**_: Any) -> Any:
        import datasets  # takes seconds to import, and most tasks do not need it here

        return {"test": datasets.Dataset.from_list([{"text": row[column]} for row in rows])}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in PASSAGE_METRICS.items()],
    }
