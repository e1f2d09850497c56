"""Committed results become tables, and runs a page."""
