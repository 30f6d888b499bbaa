"""Deep stable networks, and training strategies that break the lock along depth."""
