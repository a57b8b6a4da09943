"""The error of all data."""

from common import UserError


class DatasetError(UserError):
    """A mistake in the data that the user can correct. The message is one line that names the file and the remedy."""
