"""A number and what it counts, for people to read."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """ "1 shard", "2 shards", "1,000 decode processes"; the number is rounded to a whole one."""
    whole = round(number)
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{whole:,} {noun if whole == 1 else plural}"
