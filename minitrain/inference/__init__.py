"""Use of trained models: generate, score, merge, and the cache of a teacher's logits."""
