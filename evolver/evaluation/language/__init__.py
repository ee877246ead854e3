"""The evaluation of language models, with the tasks of lm-eval and with the users' own."""
