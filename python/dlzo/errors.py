"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one sentence that names the thing, the value and the remedy."""
