"""Finds the folders of lm-eval's library that define some tasks. This takes one second; parsing all folders takes ten.

The library has some 14,000 YAML files. A task's name stands after one of three keys at the beginning of a line, or in a
file that is included, so that a text search finds every name. lm-eval itself then reads only the few folders found.
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
# The value of one of the three keys: a name, or a list of names, below each other or in brackets.
NAME_PATTERN = re.compile(r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)
INCLUDE = re.compile(r"""^["']?include["']?[ \t]*:[ \t]*(\S+)""", re.MULTILINE)


class Index:
    """The names in lm-eval's library, and the files in which they stand."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}  # the files in which a name stands
        self._users: dict[str, set[str]] = {}  # the files that include a file
        for path in _files(LIBRARY):
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            for name in _names(text):
                self._files.setdefault(name, set()).add(path)
            for included in INCLUDE.findall(text):
                target = os.path.normpath(os.path.join(os.path.dirname(path), included.strip("'\"")))
                self._users.setdefault(target, set()).add(path)

    @property
    def names(self) -> Iterable[str]:
        """The names of all tasks, groups and tags."""
        return self._files

    def folder(self, name: str) -> str | None:
        """The innermost folder that contains all files with this name and all files that include one of them.

        It is a single folder, because lm-eval collects the tasks of a tag folder by folder. None for an unknown name.
        """
        waiting, seen = list(self._files.get(name, ())), set()
        while waiting:
            if (file := waiting.pop()) not in seen:
                seen.add(file)
                waiting += self._users.get(file, ())
        return os.path.commonpath([os.path.dirname(file) for file in seen]) if seen else None


def manager_of(names: Iterable[str], own: str | None, index: Index) -> TaskManager:
    """lm-eval's task manager for these names and for all tasks in their groups.

    Args:
        names: names of tasks, groups and tags.
        own: a folder of further task files, which take precedence over those of the library.
        index: the index of the library.
    """
    wanted = set(names)
    while True:
        folders = {folder for name in wanted if (folder := index.folder(name))}
        if str(LIBRARY) in folders:  # a tag whose tasks lie in many folders: lm-eval has to read the whole library
            return TaskManager(include_path=own)
        outermost = {f for f in folders if not any(f.startswith(g + os.sep) for g in folders)}
        # Where a name stands twice, lm-eval takes the first of several files, but the last of several folders.
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
            if file.endswith(("yaml", "yml")) or "." not in file:  # included templates often have no extension
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
