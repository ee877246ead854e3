"""Which folders of lm-eval's library say what a task is: found in a second, where parsing all of them takes ten.

The library is some 14,000 YAML files. Names stand in them under three keys at the beginning of a line, or in files that
they include, so that a search of the text finds every one; lm-eval itself then reads the few folders that matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

LIBRARY = Path(lm_eval.tasks.__file__).parent
# A name, or a list of names below each other or in brackets.
NAME_PATTERN = re.compile(r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)
INCLUDE = re.compile(r"""^["']?include["']?[ \t]*:[ \t]*(\S+)""", re.MULTILINE)


class Index:
    """The names of a library, and where they stand."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}  # by name
        self._users: dict[str, set[str]] = {}  # of each file, those that include it
        for path in _files(LIBRARY):
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            for name in _names(text):
                self._files.setdefault(name, set()).add(path)
            for included in INCLUDE.findall(text):
                target = os.path.normpath(os.path.join(os.path.dirname(path), included.strip("'\"")))
                self._users.setdefault(target, set()).add(path)

    @property
    def names(self) -> Iterable[str]:
        """All tasks, groups and tags."""
        return self._files

    def folder(self, name: str) -> str | None:
        """The innermost folder of all files that hold a name, or include one that does.

        One for all, as lm-eval gathers the tasks of a tag folder by folder.
        """
        waiting, seen = list(self._files.get(name, ())), set()
        while waiting:
            if (file := waiting.pop()) not in seen:
                seen.add(file)
                waiting += self._users.get(file, ())
        return os.path.commonpath([os.path.dirname(file) for file in seen]) if seen else None


def manager_of(names: Iterable[str], own: str | None, index: Index) -> TaskManager:
    """lm-eval's manager of these names and of all that their groups hold.

    Args:
        own: a folder of further task files, which go before those of the library.
    """
    wanted = set(names)
    while True:
        folders = {folder for name in wanted if (folder := index.folder(name))}
        if str(LIBRARY) in folders:  # a tag from all over the library
            return TaskManager(include_path=own)
        outermost = {f for f in folders if not any(f.startswith(g + os.sep) for g in folders)}
        # Of several files with one name lm-eval takes the first; of several folders, the last.
        paths = [*sorted(outermost, reverse=True), *([own] if own else [])]
        manager = TaskManager(include_path=paths, include_defaults=False)
        groups = [manager.task_index[n] for n in wanted if n in manager.all_groups]
        more = {member for group in groups for member in members(group.cfg or {})}
        if more <= wanted:
            return manager
        wanted |= more


def _files(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        for file in files:
            if file.endswith(("yaml", "yml")) or "." not in file:  # templates go by any name
                yield os.path.join(folder, file)


def _names(text: str) -> Iterator[str]:
    for said in NAME_PATTERN.findall(text):
        listed = said.strip().strip("[]")
        for word in re.split(r"\n[ \t]*-|,", listed) if said.strip().startswith(("-", "[")) else [said]:
            name = word.partition(" #")[0].strip().lstrip("- ").strip("'\"")
            if name and ":" not in name:  # in groups, members may be mappings
                yield name


def members(config: Mapping[str, Any]) -> Iterator[str]:
    """The names that a group's configuration mentions, at any depth."""
    for key in ("task", "group"):
        listed = config.get(key)
        for member in listed if isinstance(listed, list) else [listed]:
            if isinstance(member, str):
                yield member
            elif isinstance(member, dict):
                yield from members(member)
