"""Multinomial logistic regression: the objective, and a path of regularised solutions."""
