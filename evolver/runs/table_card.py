"""The data card of a table of answers: the README.md that says what is in its files, and how to read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

DATA_CARD = """---
tags: [model-merging, evolver]
configs:
- {{config_name: models, data_files: models.parquet}}
- {{config_name: items, data_files: items.parquet}}
- {{config_name: proposals, data_files: proposals.parquet}}
---
# Answers of {models} merged models to {items} items

Evolver wrote this table with `evolver export --table`, from {runs}. It holds the answers of models that searches for
the best merge have proposed, so that rules for choosing among them can be compared without scoring anything again. It
holds no texts: an item is known by its task and the hash of its content, and a model by its recipe, from which anyone
who has the experts can rebuild it.

{counts}

| file | a row is | columns |
| --- | --- | --- |
| `items.parquet` | an item | `task`; `hash` of its content; `split`, for which it was drawn; `weight` of its task in \
the score (those of all tasks add up to 1); `label`, the right answer as a number where a metric compares with it |
| `models.parquet` | a model | `recipe_id`; `kind` and `method` of the last step that made it; its `settings`; \
`inputs`, the ids of what it was made from; `recipe`, the whole lineage as JSON; `complete`, whether it \
has answered all dev items; `answers` in the order of the items, null where an item was not scored{likely} |
| `proposals.parquet` | a result of a run, in the order of its ledger | `run`, `stage`, `number`; `recipe_id`; \
`label` and `proposer`; `parents`; `limit`, the number of items that were asked for; `status`; `score`; `scored`, the \
number of items that had been scored |

The score of a model is the weighted mean over the tasks of its mean answer. {bits}

```python
import numpy as np
import pyarrow.parquet as pq

items, models = pq.read_table("items.parquet"), pq.read_table("models.parquet")
dev = np.asarray(items["split"]) == "dev"
answers = np.array(models.filter(models["complete"])["answers"].to_pylist(), dtype=float)[:, dev]  # models × dev items
```

**Selection.** The models of a search are no random sample: each was proposed after the results of others, on the items
with `split` dev. Compare rules for choosing on items that the search has not seen, or say that it has seen them.
"""
LIKELY = "; `probabilities`, how probable the model finds the right answers, where that was noted, in 16 bits each"
BITS = "Every answer is right (true) or wrong (false)."
GRADED = (
    "Answers are numbers; for metrics that are computed from counts over all items, they are each item's own score."
)


def card(runs: Sequence[str], items: pa.Table, models: pa.Table, proposals: pa.Table) -> str:
    """The text of a table's README.md."""
    split, task = items["split"].to_pylist(), items["task"].to_pylist()
    each = Counter(zip(task, split, strict=True))
    splits = list(dict.fromkeys(split))
    head = f"| items of | {' | '.join(splits)} |\n| --- |{' --- |' * len(splits)}\n"
    counts = head + "\n".join(
        f"| {t} | {' | '.join(str(each[t, s]) for s in splits)} |" for t in dict.fromkeys(task)
    )  # fmt: skip
    complete = pc.sum(models["complete"]).as_py()
    methods = Counter(models["method"].to_pylist()).most_common()
    said = ", ".join(f"{count} by {method}" for method, count in methods)
    ran = ", ".join(f"`{run}` ({proposals['run'].to_pylist().count(run)} results)" for run in runs)
    made = f"{complete} of the {models.num_rows} models have answered all dev items. Their last steps: {said}."
    bits = BITS if pa.types.is_boolean(models.schema.field("answers").type.value_type) else GRADED
    return DATA_CARD.format(
        models=models.num_rows, items=items.num_rows, runs=f"the runs {ran}" if len(runs) > 1 else f"the run {ran}",
        counts=f"{counts}\n\n{made}", bits=bits, likely=LIKELY if "probabilities" in models.column_names else "",
    )  # fmt: skip
