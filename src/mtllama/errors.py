"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file, row, tensor, key) and how to mend it.

    The command line prints the message alone and exits with status 2; a library caller gets the exception.
    """


class MissingDataError(UserError):
    """A data set is not where it was looked for: who can do without it goes on."""
