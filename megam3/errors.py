"""Errors a user can meet.

Every one says four things: which field (or file and line), which value, which rule it breaks, and what to do about it.
The command line prints them without a traceback; our own bugs are asserts and keep theirs.
"""


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
