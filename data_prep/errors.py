"""The one error of `vitpa prep` that its user has to act on."""


class PrepError(Exception):
    """A conversion that cannot be done: what, where and how to fix it; lists follow on lines of their own."""
