"""The faults a user can meet. Each message says where, what was found, what was expected and which key to change."""


class PipelineError(Exception):
    """A fault that ends a stage with one message instead of a traceback."""


class ConfigError(PipelineError):
    """A parameter has a value the pipeline cannot use."""


class DataError(PipelineError):
    """The data is missing, empty or of another shape than configured."""


class ModelError(PipelineError):
    """A model folder or an adapter is not what it should be."""


class ExternalError(PipelineError):
    """Something outside refused: registry, hub, disk, converter."""


class GateError(PipelineError):
    """A measured bound was broken: the numbers say that the result must not be used."""


class Pruned(PipelineError):
    """A training was asked to stop because others do better: neither a result nor a fault."""


def check_values(*rules: tuple[str, object, bool, str]) -> None:
    """Check the values of one section together and report all that is wrong at once.

    Args: rules: (key, found, holds, expected) for each claim about a value.
    Raises: ConfigError, one line for each claim that does not hold.
    """
    faults = [f"{key}: found {found!r}, expected {expected}" for key, found, holds, expected in rules if not holds]
    if faults:
        raise ConfigError("\n".join(faults))
