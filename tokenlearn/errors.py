"""The one exception that the command line reports without a traceback, and what often goes with it."""


class UserError(ValueError):
    """Input that a user can correct; the message is one line that names the offending value and the fix."""


def check_at_least(section: str, least: int, **numbers: float | None) -> None:
    """Refuse settings below a bound, or that are no numbers; None is no setting.

    Args:
        section: part of the config that the settings are in, such as ``data``.
        least: the bound.
        numbers: settings by name.

    Raises:
        UserError: naming the first that is out of range.
    """
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise UserError(f"{section}.{name} must be at least {least}, got {number}")


def reason_of(error: Exception) -> str:
    """What an error of a library says, in one line of at most 200 characters; its kind if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
