"""The config of a run: keys, defaults and ranges, and how it is composed, checked and explained. Imports no torch."""
