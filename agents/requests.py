"""The requests level: its fold, bound to `request.traces`."""

from models.requests.fold import RequestsFold

__all__ = ["RequestsFold"]
