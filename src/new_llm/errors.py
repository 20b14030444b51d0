"""Typed errors. Each says what was wanted, what was given and what to do, in one or two lines."""


class NewLLMError(Exception):
    """Base of every error that a user can meet; the command line prints it without a traceback."""

    exit_code = 2
    said = False
    """Whether another process of the same run says it."""


class ConfigError(NewLLMError):
    """A setting is unknown or out of its range."""


class DataError(NewLLMError):
    """Dialogues or tokenizer cannot be read or used."""


class CheckpointError(NewLLMError):
    """A checkpoint or run folder is missing, damaged, or belongs to something else."""


class StaleCacheError(NewLLMError):
    """A cache was built by other weights, another solver or other data."""


class DamagedCacheError(NewLLMError):
    """A cache file does not match its own description."""


class StoppedError(NewLLMError):
    """A run had to stop itself; what it wrote so far is whole and can be resumed."""

    exit_code = 3


class GateError(StoppedError):
    """Phase 1 did not pass the gate, so Phase 2 may not start."""


class NonFiniteError(StoppedError):
    """A loss, gradient or context became NaN or infinite."""


class HubLostError(StoppedError):
    """The hub gave some rows and then no more."""


class DiskFullError(StoppedError):
    """There is no room left for what must be written."""


class LostProcessError(StoppedError):
    """Another process of the same run is gone."""
