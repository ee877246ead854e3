"""The evaluation of language models, on tasks of lm-eval and on the user's own texts."""
