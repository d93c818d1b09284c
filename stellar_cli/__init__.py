"""The command `stellar`.

A package of its own, because importing `lightly_ext` extends lightly's namespaces, and
importing `stellar_plugin` registers sizes with timm: seconds, where help needs none.
"""
