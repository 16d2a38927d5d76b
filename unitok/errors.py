"""The one exception that speaks to a person: a mistake that its user can mend.

The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""
