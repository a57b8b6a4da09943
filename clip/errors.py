"""What can be wrong with weights."""


class WeightsError(Exception):
    """A mistake in weight files that the user can mend; the message is one line with the remedy."""
