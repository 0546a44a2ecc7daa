"""The optimizer's state in a checkpoint: by the parameters' names, which are the same however weights are shared out.

torch numbers parameters in the order of the optimizer's groups, Lightning's ModelParallelStrategy in the order of the
module's, so that neither could go on from the other's checkpoint. By name both can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

State = dict[str, Any]


def with_keys(state: State, keys: Sequence[str] | Mapping[str, int]) -> State:
    """An optimizer's state_dict whose parameters are called keys[n] instead of n: names by number, or the inverse.

    Sorted in their groups, for torch loads a parameter's state by its place there.
    """
    return {
        "state": {keys[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": sorted(keys[key] for key in group["params"])} for group in state["param_groups"]
        ],
    }
