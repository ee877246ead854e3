"""The kinds of evaluation, one file each, which is found by its name and imported when a task asks for it."""
