"""The ledger of a run: the record of everything that was proposed and scored."""

from evolver.ledger.answers import answer_table, write_items
from evolver.ledger.ledger import Ledger
from evolver.ledger.parts import DamagedPart, damaged, part_names, read_part, read_parts, read_table
from evolver.ledger.rows import SCHEMA, candidate_of, result_of

__all__ = [
    "SCHEMA", "DamagedPart", "Ledger", "answer_table", "candidate_of", "damaged", "part_names", "read_part",
    "read_parts", "read_table", "result_of", "write_items",
]  # fmt: skip
