"""The protocol card and the provenance of a run of mmsegmentation."""
