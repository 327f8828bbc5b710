"""The recipes, one a file. `saisa_jax/configs` is a link to this folder, so that an installed program has them too."""
