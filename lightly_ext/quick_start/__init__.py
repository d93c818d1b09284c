"""`stellar try`: from a folder of photos to a page, within a time."""
