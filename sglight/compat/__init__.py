"""Undocumented parts of other libraries that sglight depends on: one file for each library."""
