"""The trials of a search: what they may set, who draws them, which go on, and the ledger that says which there are."""
