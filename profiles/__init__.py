"""Shipped facts (devices, models, engines, kernel times) and the programs that make them."""
