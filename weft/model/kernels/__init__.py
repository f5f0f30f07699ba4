"""Products with weights: formats, kernels that multiply with them, and which one this machine is fastest with."""
