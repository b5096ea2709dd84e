"""The demonstration: three fictional customers on one small base model, from nothing to answers."""
