"""The ledger of a run: the record of everything that was proposed and scored."""

from evolver.ledger.answers import ItemName, answer_table, item_places, items_of, write_items
from evolver.ledger.ledger import Ledger
from evolver.ledger.parts import DamagedPart, damaged, part_names, read_all_parts, read_part, read_parts, read_table
from evolver.ledger.retried import has_retries, standing
from evolver.ledger.rows import SCHEMA, LostRecipe, candidate_of, nodes_of, result_of

__all__ = [
    "SCHEMA", "DamagedPart", "ItemName", "Ledger", "LostRecipe", "answer_table", "candidate_of", "damaged",
    "has_retries", "item_places", "items_of", "nodes_of", "part_names", "read_all_parts", "read_part", "read_parts",
    "read_table", "result_of", "standing", "write_items",
]  # fmt: skip
