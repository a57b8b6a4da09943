"""What can be wrong with weights."""

from common import UserError


class WeightsError(UserError):
    """A mistake in weight files that the user can correct; the message is one line with the remedy."""
