"""The one exception that the command line reports without a traceback."""


class UserError(ValueError):
    """Input that a user can correct; the message is one line that names the offending value and the fix."""
