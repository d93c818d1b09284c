"""Segmentation of whole images with frozen features: by neighbours, by clusters."""
