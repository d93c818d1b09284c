"""The demo on photographs: a prior, STELLAR, and what they have learned."""
