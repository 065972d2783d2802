"""Worlds that the product is proved on. They share no code with it, and take their seeds as arguments."""
