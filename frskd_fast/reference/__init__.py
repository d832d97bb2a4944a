"""Plain differentiable PyTorch: the specification of every operation, its fallback, and the truth of the tests."""
