"""kNN, linear probes and fine-tuning."""
