"""The error type of this package."""

from common import UserError


class WeightsError(UserError):
    """A weight file that is missing, damaged or belongs to something else. The message names it and the remedy."""
