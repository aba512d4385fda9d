"""Errors a user can meet.

Every one says four things: which field (or file and line), which value, which rule it breaks, and what to do
about it. The command line prints them without a traceback; our own bugs are asserts and keep theirs.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)
"""What a file system answers that is full, read-only, not ours, or asked for a path that cannot be: a
person's matter, no fault of the code."""
MAX_SHOWN_PATH = 200


class UserError(ValueError):
    """Bad input: `what` (field, or file:line), its `value`, the `rule` it breaks and the `remedy`.

    >>> str(UserError("optim.lr", -1.0, "must be positive", "set optim.lr, e.g. 1e-5"))
    'optim.lr = -1.0: must be positive; set optim.lr, e.g. 1e-5'
    """

    def __init__(self, what: str, value: object, rule: str, remedy: str):
        self.what, self.value, self.rule, self.remedy = what, value, rule, remedy
        super().__init__(f"{what} = {value!r}: {rule}; {remedy}")

    def __reduce__(self) -> tuple:
        # the default pickling of exceptions passes only the message; workers send these across processes
        return type(self), (self.what, self.value, self.rule, self.remedy)


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed template is wrong."""


class DataError(UserError):
    """A record, a file or a tokenised store is wrong; `what` is `file:line` where there is one."""


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder cannot be used."""


class TrainingError(UserError):
    """Training met a value it must not continue from, such as a non-finite loss."""


def refused_path(error: OSError, path: str, remedy: str) -> UserError | None:
    """What a person reads when the file system refuses a path for one of REFUSALS; None for other errors.

    Args:
        path: where the error names none.
    """
    if error.errno not in REFUSALS:
        return None
    where = shown_path(str(error.filename or path))
    return UserError("file", where, f"cannot be used ({error.strerror})", remedy)


def shown_path(path: str) -> str:
    """`path`, cut to what a message can hold."""
    return path if len(path) <= MAX_SHOWN_PATH else f"{path[:MAX_SHOWN_PATH]}…"


class GroupedConfigError(ConfigError):
    """Two or more ConfigErrors; `problems` holds them, the message has one line for each.

    `what`, `value`, `rule` and `remedy` are those of the first.
    """

    def __init__(self, problems: Iterable[ConfigError]):
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.what, first.value, first.rule, first.remedy)

    def __str__(self) -> str:
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems\n{lines}"

    def __reduce__(self) -> tuple:
        return type(self), (self.problems,)


def raise_all(problems: Iterable[ConfigError]) -> None:
    """Return without problems, raise the only one as it is, or all of them as one `GroupedConfigError`.

    One run of the command line is then enough to repair a recipe.
    """
    found = tuple(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise GroupedConfigError(found)
