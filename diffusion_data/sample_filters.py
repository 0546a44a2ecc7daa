"""Bounds on metadata fields -> which samples are trained on.

    filters: {aesthetic_score: {min: 5}, num_frames: {min: 1, max: 121}, clip_score: {min: 0.3, missing: keep}}

A sample is used if every bound holds. One that lacks a field is left out, since nobody knows that the bound holds, and
a mistyped field shows at once; `missing: keep` lets it pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_data.errors import UserError

_OPTIONS = {"min", "max", "missing"}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """min <= metadata[field] <= max"""

    field: str
    min: float
    max: float
    keep_missing: bool

    @property
    def reasons(self) -> tuple[str, str]:
        """What skips are counted under: a value out of bounds, and none at all."""
        return f"{self.field}_out_of_bounds", f"without_{self.field}"

    def reason_to_skip(self, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
        """Reason and message; None for a sample that is used. The value has to be a finite number or None."""
        value = metadata.get(self.field)
        out_of_bounds, missing = self.reasons
        if value is None:
            return None if self.keep_missing else (missing, f"its metadata has no {self.field}")
        if self.min <= float(value) <= self.max:
            return None
        bound = f"below {self.min:g}" if float(value) < self.min else f"above {self.max:g}"
        return out_of_bounds, f"{self.field} {value} is {bound}"


def parse_filters(filters: Mapping[str, Mapping[str, Any]]) -> Sequence[Bound]:
    """The option `filters` as bounds.

    Raises:
        UserError: a bound is not {min, max, missing}, or none of the first two.
    """
    return [_bound(str(field), options) for field, options in filters.items()]


def _bound(field: str, options: Any) -> Bound:
    example = f"{{{field}: {{min: 5}}}}"
    if not isinstance(options, Mapping) or not options.keys() <= _OPTIONS or not options.keys() & {"min", "max"}:
        raise UserError(f"filters: {field} needs min or max (and may have `missing: keep`), as in {example}")
    limits = {"min": -math.inf, "max": math.inf}
    for name in limits:
        value = options.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise UserError(f"filters: {name} of {field} must be a number, got {value!r}")
        limits[name] = float(value)
    if limits["min"] > limits["max"]:
        raise UserError(f"filters: no {field} is both at least {limits['min']:g} and at most {limits['max']:g}")
    if options.get("missing", "skip") not in ("skip", "keep"):
        raise UserError(f"filters: missing of {field} must be skip or keep, got {options['missing']!r}")
    return Bound(field=field, **limits, keep_missing=options.get("missing") == "keep")
