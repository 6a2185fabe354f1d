"""Errors a person can act on; each message says what is wrong, where, and what to do."""


class MfdetrError(Exception):
    """The input cannot be used as given; the command line prints one line and exits with 2."""


# What a command of many steps says when one of them was stopped.
SAME_COMMAND = "stopped by a signal; the same command goes on from there"


class StoppedError(MfdetrError):
    """Somebody asked to stop; what was done is kept. The command line exits with 130."""


class CheckFailedError(MfdetrError):
    """A check ran and found a fault. The command line exits with 1."""


class ConfigError(MfdetrError):
    """A setting is unknown or has a value that cannot be used."""


class DatasetError(MfdetrError):
    """The annotation file or the image folder cannot be used."""


class ImageError(DatasetError):
    """One image cannot be read or does not fit its annotation."""


class DetectorError(MfdetrError):
    """The detector's weights cannot be found, read or trusted."""


class CacheError(MfdetrError):
    """A feature cache is missing, damaged, unfinished, or of another kind than was asked for."""


class IdentityError(CacheError):
    """Two artefacts that must come from the same detector do not."""


class HeadError(MfdetrError):
    """A trained mask network is missing, damaged, or does not fit the cache."""


class OutputError(MfdetrError):
    """A result cannot be written: the disk is full, or the place is not allowed."""


class TrainingError(MfdetrError):
    """Training cannot go on (a loss that is not finite, nothing to learn from)."""


# The end of every message about a damaged cache.
MEND = "mend it with: mfdetr cache repair"
