"""The one error that means "what the user gave cannot be used": entry points print its single line
and exit with status 2.
"""


class UserError(ValueError):
    """A message for the user: names the file, field or flag, and what to do about it."""
