"""Which group of columns each scale is for: in order, or as a `g_idx` says (GPTQ's act-order).

Shape letters: K input columns.
"""

from __future__ import annotations

import numpy as np

from octavo.quant.checkpoint.modules import Module


def column_order(module: Module, suffix: str, columns: int, group_size: int | None) -> np.ndarray | None:
    """int32 [K]: the columns sorted by group, or None where they lie in order (or the part is missing).

    Raises ModelFormatError where the groups are not each of `group_size` columns.
    """
    if suffix not in module.parts:
        return None
    module.part(suffix, "i32", 1)
    module.expect(suffix, (columns,))
    groups = module.parts[suffix].read()
    expected = np.arange(columns) // (group_size or columns)
    if (groups == expected).all():
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if (groups[order] != expected).any():
        raise module.malformed(f"has a {suffix} whose groups are not of {group_size} columns each")
    return order
