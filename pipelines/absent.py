"""
Fields that are not written where they say nothing.

A slice or a record that has none of them is byte for byte what it was before there was the field,
so that a new field lets nothing be made or measured again.
"""

from __future__ import annotations


def is_none(value: object) -> bool:
    """Say whether a field is left out: `Field(None, exclude_if=absent.is_none)`."""
    return value is None
