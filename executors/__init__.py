"""Separate processes that carry out dispatched decisions, one module a target; they know nothing of what decided."""
