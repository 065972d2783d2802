"""Level 1, nodes: what exporters read on a host becomes windows per GPU and per engine replica."""
