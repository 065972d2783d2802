"""The fleet level: what governs. The only way from a proposal to a decision that is carried out."""
