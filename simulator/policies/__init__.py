"""Scheduling policies: how an engine forms each iteration, one engine per file."""
