"""Object discovery: what is an object, without labels, and how well that fits."""
