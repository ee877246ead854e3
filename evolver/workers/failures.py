"""What an exception during an evaluation says about the candidate, and the sentence that the report shows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from evolver.errors import BadInput, EvolverError, file_sentence

# Packages whose exceptions say that a server could not be reached.
NETWORK = frozenset({"aiohttp", "grpc", "httpcore", "httpx", "ray", "requests", "urllib3"})
# What torch and the libraries below it say where memory is short and the class of the exception does not tell.
SHORT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


class BrokenDevice(EvolverError):
    """The accelerator has failed. This process can compute nothing on it any more; another process perhaps can."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on the device or on the machine."""
    return any(
        isinstance(e, MemoryError | torch.OutOfMemoryError)
        or (isinstance(e, RuntimeError) and any(said in str(e).lower() for said in SHORT_OF_MEMORY))
        for e in _causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether the candidate is not to blame, so that another try may succeed: a file or a server was not there."""
    return any(isinstance(e, OSError) or type(e).__module__.split(".")[0] in NETWORK for e in _causes(error))


def is_broken_device(error: BaseException) -> bool:
    """Whether the accelerator reports an error after which every later call fails."""
    return any(isinstance(e, torch.AcceleratorError) for e in _causes(error)) and not is_out_of_memory(error)


def told_reason(error: Exception) -> str:
    """Why a candidate has failed, in a sentence for the report."""
    if is_out_of_memory(error):
        said = "memory ran out; lower evaluation.batch_size or pool.cache_gb, or use a device with more memory"
        return f"{said} ({_words(error)})"
    if isinstance(error, BadInput):
        return _words(error)
    if isinstance(error, OSError) and error.filename is not None:
        return file_sentence(error, "")
    return f"{type(error).__name__}: {_words(error)}"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
