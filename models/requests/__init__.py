"""Level 1, requests: what gateways saw becomes windows per pool, tenant and class."""
