"""One file per operation: checks, choice of implementation, autograd, registration for ``torch.compile``."""
