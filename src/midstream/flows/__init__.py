"""Flows: intrinsics and base turns composed."""
