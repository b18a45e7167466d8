"""Worked pipelines from data to decision, each one module to read from top to bottom.

`robustreg example NAME` runs one of them with the numbers of `configs/examples/NAME.toml`. A pipeline uses the public
names of the library, JAX, optax and NumPy, as a program of a user would. It returns a `Report`: a table, the numbers
behind it, a picture, and the claims that it makes, each with the verdict of this very run.
"""
