"""The node level: its fold, bound to `node.samples`."""

from models.node.fold import NodeFold

__all__ = ["NodeFold"]
