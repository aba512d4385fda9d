"""Several configuration errors reported together, so that one run of the command line is enough to repair a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from megam3.errors import ConfigError


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


def raise_problems(problems: Iterable[ConfigError]) -> None:
    """Return without problems, raise the only one as it is, or all of them as one `GroupedConfigError`."""
    found = tuple(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise GroupedConfigError(found)
