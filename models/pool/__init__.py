"""Level 2: one partition of `pool.signals`: cost, load, capacity, plan, health, verification of many pools."""
