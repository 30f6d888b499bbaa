"""The config of a run: its keys and their defaults and ranges, how it is composed, checked and explained; no torch."""
