"""Structured pruning: fewer layers, heads, neurons and channels, in a folder that any engine loads."""
