"""Which columns each scale is for: so many in order, or as a `g_idx` says (GPTQ's act-order).

Shape letters: K input columns.
"""

from __future__ import annotations

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.quant.checkpoint.modules import Module


def group_columns(config: ConfigReader, key: str, columns: int) -> int | None:
    """The group size that a config states, -1 meaning whole rows; None for one group a row.

    Raises UnsupportedConfigError for what is no size. A group wider than the row is the row: whoever allocates by
    group sizes must not meet one that only the config bounds.
    """
    size = config.raw(key, -1)
    if type(size) is not int or (size < 1 and size != -1):
        raise config.unsupported(key, "is neither a number of columns nor -1")
    return None if size == -1 or size >= columns else size


def column_order(
    module: Module, suffix: str, columns: int, group_size: int | None, *, promised: bool
) -> np.ndarray | None:
    """int32 [K]: the columns sorted by group, or None where they lie in order (or the part is missing).

    Raises ModelFormatError where the groups are not each of `group_size` columns, and where the part is missing
    though the config has `promised` an order and there is more than one group to order by.
    """
    if suffix not in module.parts:
        if promised and group_size is not None:
            raise module.malformed(f"has no {suffix}, though the config says that columns are out of order")
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
