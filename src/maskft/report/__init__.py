"""Committed results become tables."""
