"""The report of a run: its text, its verdict, its curve, and its HTML page."""
