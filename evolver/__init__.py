"""Evolver: search for the best merge of several fine-tunes of one base model.

Where everything is, from the ground up:

- ``records``, ``config``, ``errors``, ``threads``, ``storage/``: recipes, candidates, results; settings; how threads
  wait; folders and object stores
- ``merging/``, ``search/``, ``evaluation/``, ``ledger``: four rooms that do not know each other
- ``worker``, ``compute``, ``shards``, ``messages``, ``process_pool``: recipe → live model → scores, here or in another
  process, in the dtype that is faster there
- ``flights``, ``loop``, ``estimates``: ask, look up, submit, collect, record, tell
- ``folder``, ``about``, ``run``, ``progress``, ``pace``, ``loggers/``: a run from end to end, and who hears
  of it
- ``history``, ``outcome``, ``report``, ``curve``, ``html``, ``card``: what came out, told to people
- ``overview``, ``status``, ``dashboard/``: what goes on, while it goes on
- ``export``, ``deliver``: models to take along
- ``merge``, ``explain``, ``evaluate``, ``training/``, ``doctor``, ``reference``, ``cli``: what stands around a run
"""

__version__ = "0.1.0"
