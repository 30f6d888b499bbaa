"""Compares runs: reads what they have left, and writes tables and a page with charts."""
