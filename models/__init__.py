"""Everything that computes or learns. Pure: no I/O, clock, logging, asyncio; knows only `schemas`."""
