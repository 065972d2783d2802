"""`fleetloop`: one command for everything. Wires packages together; computes nothing itself."""
