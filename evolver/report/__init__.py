"""What people are told of a run: the report, its verdict, its curve, and its page."""
