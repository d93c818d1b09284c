"""`stellar atlas`: the parts of a folder of images, as a page that one can walk."""
