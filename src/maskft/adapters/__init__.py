"""Adapters on disk: the base they belong to, and export into the base."""
