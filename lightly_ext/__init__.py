"""How STELLAR is learned, in lightly's style: losses, transforms, pretraining."""
