"""What leaves the planner as something that launches."""
