"""Every error fluxc raises. A UserError is the input's fault (exit code 2); an InternalError is ours (exit code 1).

The text is one line: it names the thing, says the reason and gives the next step.
"""

from __future__ import annotations


class FluxcError(Exception):
    """Base of all errors of fluxc. `hint` is the next step for the reader, shown after the message."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class UserError(FluxcError):
    """The input cannot be used as it is; nothing was written."""

    exit_code = 2


class OptionError(UserError):
    """An option has an unknown name or a value out of range."""


class SourceError(UserError):
    """The model named on the command line is missing, or is not a causal language model."""


class ArchiveError(UserError):
    """A saved program is truncated, corrupted, or holds something that loading would execute."""


class CaptureError(UserError):
    """The model was found, but cannot be captured into fluxc's normal form."""


class UnsupportedAttentionError(CaptureError):
    """An attention uses something fluxc does not represent; the text names the node and the feature."""


class DataError(UserError):
    """A prompt file has a bad line (its number is in the text), or holds nothing usable."""


class TrainingError(UserError):
    """Training cannot go on: a loss that is not finite, or a checkpoint of another run."""


class ContextError(DataError):
    """A prompt leaves no room for an answer in the model's context."""


class PlanError(UserError):
    """A plan does not fit the model, or asks for a budget it was not calibrated for."""


class TargetError(UserError):
    """A target of export cannot be had: its library is missing, or it cannot express the model."""


class OutputExistsError(UserError):
    """The output path exists and `--force` was not given."""


class StorageError(UserError):
    """Writing failed: no space left, no permission, read-only file system."""


class InternalError(FluxcError):
    """A bug in fluxc: a contract between two of its own parts does not hold."""


class VerifierError(InternalError):
    """A program breaks the rules of its stage."""


class BuilderError(InternalError):
    """A compiler that fluxc calls failed; the text has the last lines it said."""


class LoweringError(InternalError):
    """A node that must be gone after lowering is still there."""


class SelfCheckError(InternalError):
    """The captured program does not compute what the source model computes."""
