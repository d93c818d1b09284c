"""Encoders that take no latent queries: the networks of other methods.

`network` has what all are, and any model of timm; a module per family follows.
"""

from stellar_plugin.networks.network import Network, TimmNetwork

__all__ = ["Network", "TimmNetwork"]
