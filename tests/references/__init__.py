"""One module a recipe: the same steps, computed densely in float64 from the paper, with nothing of `precond`."""
