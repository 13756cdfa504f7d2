"""What a plan does: an iteration-level simulator of LLM serving (numpy and numba only)."""
