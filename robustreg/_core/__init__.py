"""What every other package stands on: pytrees and their layouts, loops, checks on the host, files that appear whole.

`pytrees` and `discrete` define the frozen dataclasses that all objects are, and the two layouts of an array; `loops`
are JAX's, such that they also run inside `jax.shard_map`, `closures` opens a caller's functions, `roots` finds roots
lane by lane; `checks` and `containers` take in what people have, `names` keeps their names; `files` and `npz` write and
read; `settings`, `forks` and `interrupts` are about threads, processes and signals. Nothing here knows what an MDP is.
"""
