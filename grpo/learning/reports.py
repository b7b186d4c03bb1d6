"""What the micro-batches of an update report, added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def summed(reports: Sequence[dict[str, Tensor]]) -> tuple[dict[str, float], float]:
    """Returns the sums of the micro-batches' values by name, and the largest `_highest`.

    All values come from the device in one transfer.
    """
    if not reports:
        return {"loss": 0.0}, 0.0
    names = list(reports[0])
    rows = torch.stack(
        [torch.stack([report[name].double() for name in names]) for report in reports]
    ).tolist()
    sums = {name: sum(row[place] for row in rows) for place, name in enumerate(names)}
    sums.pop("_highest")
    return sums, max(row[names.index("_highest")] for row in rows)
