"""The pool level: its fold, bound to `pool.signals`."""

from models.pool.fold import PoolFold

__all__ = ["PoolFold"]
